// SPDX-License-Identifier: Apache-2.0
// Draws web/docs/<node id>.jpg, the smallest graph that each help page shows, from parts of the
// workflows in workflows/api.
//
//   node draw_help.mjs http://127.0.0.1:8188
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { arrange } from "./layout.mjs";
import { fitView, openPage } from "./page.mjs";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
// Node id -> workflow, and which of its nodes in which columns.
const GRAPHS = {
  LacunaConceptSet: ["erase_words", [["1"], ["2"], ["3"]]],
  LacunaAttentionRefine: ["erase_words", [["1", "2"], ["3"], ["8"]]],
  LacunaLoRAErase: ["full_pipeline_with_evaluation", [["1", "2"], ["3"], ["4"], ["5"]]],
  LacunaLoRAFuse: ["add_concept_to_bundle", [["1", "3"], ["5"], ["6"], ["11"]]],
  LacunaSaveLoRA: ["erase_words_save_lora", [["1", "2"], ["3"], ["14"]]],
  LacunaSaveBundle: ["full_pipeline_with_evaluation", [["4"], ["5"], ["7"]]],
  LacunaLoadBundle: ["add_concept_to_bundle", [["1", "3"], ["6"], ["11"]]],
};

const [url] = process.argv.slice(2);
const { browser, page } = await openPage(url, { width: 1500, height: 900 });
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
    const boxes = window.app.graph.nodes.map((node) => node.boundingRect ?? node.getBounding());
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
  const picture = await page.screenshot({ clip, type: "jpeg", quality: 80 });
  await writeFile(`${ROOT}web/docs/${name}.jpg`, picture);
}
await browser.close();
