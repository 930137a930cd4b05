// SPDX-License-Identifier: Apache-2.0
// Draws web/docs/<node id>.jpg, the smallest graph that each help page shows, from parts of the
// workflows in workflows/api; for Evaluate Erasure the sheet of a run that this server has made.
//
//   node draw_help.mjs http://127.0.0.1:8188
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { arrange } from "./layout.mjs";
import { fitView, openPage } from "./page.mjs";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
// Node id -> workflow, and which of its nodes in which columns.
const GRAPHS = {
  LacunaConceptSet: ["erase_words", [["1", "2"], ["3"]]],
  LacunaAttentionRefine: ["erase_words", [["1", "2"], ["3"], ["8"]]],
  LacunaLoRAErase: ["full_pipeline_with_evaluation", [["1", "2"], ["3"], ["4"], ["5"]]],
  LacunaLoRAFuse: ["add_concept_to_bundle", [["1", "3"], ["5"], ["6"], ["11"]]],
  LacunaSaveLoRA: ["erase_words_save_lora", [["1", "2"], ["3"], ["14"]]],
  LacunaSaveBundle: ["full_pipeline_with_evaluation", [["4"], ["5"], ["7"]]],
  LacunaLoadBundle: ["add_concept_to_bundle", [["1", "3"], ["6"], ["11"]]],
};

const [url] = process.argv.slice(2);
const { browser, page } = await openPage(url, { width: 1500, height: 900 });
await page.evaluate(async () => {
  const { setting } = window.app.extensionManager;
  for (const panel of ["Comfy.Minimap.Visible", "Comfy.RightSidePanel.IsOpen"]) await setting.set(panel, false);
});
for (const [name, [workflow, layout]] of Object.entries(GRAPHS)) {
  const api = JSON.parse(await readFile(`${ROOT}workflows/api/${workflow}.json`, "utf8"));
  const chosen = layout.flat();
  const part = Object.fromEntries(
    chosen.map((id) => {
      const inputs = Object.entries(api[id].inputs).filter(
        ([, value]) => !Array.isArray(value) || chosen.includes(value[0]),
      );
      return [id, { ...api[id], inputs: Object.fromEntries(inputs) }];
    }),
  );
  await arrange(page, part, name, layout, true);
  await page.waitForTimeout(1000); // the page fits its view by itself after loading
  await fitView(page);
  const clip = await page.evaluate(() => {
    const boxes = window.app.graph.nodes.map((node) => [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]);
    const { scale, offset } = window.app.canvas.ds;
    const margin = 12;
    const left = Math.min(...boxes.map((box) => box[0]));
    const top = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2]));
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
    return {
      x: (left + offset[0]) * scale - margin,
      y: (top + offset[1]) * scale - margin,
      width: (right - left) * scale + 2 * margin,
      height: (bottom - top) * scale + 2 * margin,
    };
  });
  const picture = await page.screenshot({ clip, type: "jpeg", quality: 70 });
  await writeFile(`${ROOT}web/docs/${name}.jpg`, picture);
}
const sheet = await page.evaluate(async () => {
  const history = Object.values(await (await fetch("/history")).json());
  for (const { prompt, outputs } of history.reverse()) {
    for (const [id, { images }] of Object.entries(outputs)) {
      if (!images || prompt[2][id].inputs.level !== "quick") continue;
      const picture = new Image();
      picture.src = `/view?${new URLSearchParams(images[0])}`;
      await picture.decode();
      const width = Math.min(picture.width, 900);
      const height = (picture.height * width) / picture.width;
      // The top is enough to see what a sheet looks like.
      const shown = { width, height: Math.min(height, width) };
      const canvas = Object.assign(document.createElement("canvas"), shown);
      canvas.getContext("2d").drawImage(picture, 0, 0, width, height);
      return canvas.toDataURL("image/jpeg", 0.8);
    }
  }
  throw new Error("run full_pipeline_with_evaluation on this server first");
});
await writeFile(
  `${ROOT}web/docs/LacunaEvaluateErasure.jpg`,
  Buffer.from(sheet.split(",")[1], "base64"),
);
await browser.close();
