// SPDX-License-Identifier: Apache-2.0
// Writes workflows/<name>.json, the format that the page saves, from workflows/api/<name>.json, runs
// it, and draws the pictures of the nodes titled Before and After into workflows/<name>.jpg.
//
//   node build_workflows.mjs http://127.0.0.1:8188 erase_words [...]
//
// The page itself lays the widgets out and serialises; positions are those of LAYOUT below: columns
// from left to right, each a list of node ids from top to bottom.
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { dropWorkflow, openPage, overlaps, run, shownPictures } from "./page.mjs";

const WORKFLOWS = fileURLToPath(new URL("../../workflows/", import.meta.url));
const [COLUMN_GAP, ROW_GAP] = [60, 70];
const WIDTH = {
  CheckpointLoaderSimple: 320,
  CLIPTextEncode: 320,
  EmptyLatentImage: 320,
  LacunaConceptSet: 400,
  LacunaAttentionRefine: 400,
  KSampler: 320,
  SaveImage: 360,
  LacunaSaveLoRA: 360,
  PreviewAny: 320,
};
const HEIGHT = {
  CLIPTextEncode: 120,
  LacunaAttentionRefine: 480, // room for the report below the widgets
  LacunaConceptSet: 420,
  LacunaSaveLoRA: 130,
  PreviewAny: 300,
  SaveImage: 270, // low enough that the page shows four small pictures as a square
};
const NOTES = {
  erase_words: `Both pictures start from the same noise; only the model differs.

Type what the model must forget into **Concept Set**, one phrase a line: \`target -> what to draw instead\`. List what must stay under *preserve*. Press Run.

Works with SD1.x, SD2.x and SDXL checkpoints: choose yours, and set width and height to its size. The small demo model draws 64 x 64.`,
  erase_words_save_lora: `As *erase words*, and the edit is also saved as a LoRA in \`output/loras\`: it loads in ComfyUI, A1111/Forge and diffusers like any other.

Strength 1.0 of that LoRA is the strength set in **Attention Refine**. The report says what its rank leaves out.`,
};
const LAYOUT = {
  erase_words: [["1", "6"], ["2", "4", "5"], ["3"], ["7", "8"], ["9", "10", "13"], ["11", "12"]],
  erase_words_save_lora: [
    ["1", "6"], ["2", "4", "5"], ["3", "14"], ["7", "8"], ["9", "10", "13"], ["11", "12"],
  ],
};

async function build(page, name) {
  const api = JSON.parse(await readFile(`${WORKFLOWS}api/${name}.json`, "utf8"));
  const workflow = await page.evaluate(
    async ({ api, name, note, layout, width, height, gaps }) => {
      await window.app.loadApiJson(api, name);
      let x = 40;
      for (const column of layout) {
        let y = 60;
        let widest = 0;
        for (const id of column) {
          const node = window.app.graph.nodes.find((node) => String(node.id) === id);
          const [, smallest] = node.computeSize();
          node.setSize([width[node.type] ?? 260, Math.max(smallest, height[node.type] ?? 0)]);
          node.pos = [x, y];
          node.title = api[id]._meta.title;
          y += node.size[1] + gaps[1];
          widest = Math.max(widest, node.size[0]);
        }
        x += widest + gaps[0];
      }
      const comment = window.LiteGraph.createNode("MarkdownNote");
      window.app.graph.add(comment);
      const lowest = window.app.graph.nodes.find((node) => String(node.id) === layout[0].at(-1));
      comment.pos = [lowest.pos[0], lowest.pos[1] + lowest.size[1] + gaps[1]];
      comment.setSize([lowest.size[0], 340]);
      comment.widgets[0].value = note;
      for (const node of window.app.graph.nodes) {
        for (const widget of node.widgets ?? []) {
          if (widget.name === "control_after_generate") widget.value = "fixed";
        }
      }
      window.app.graph.nodes.sort((a, b) => Number(a.id) - Number(b.id));
      const saved = window.app.graph.serialize();
      saved.nodes.sort((a, b) => a.id - b.id);
      return saved;
    },
    {
      api,
      name,
      note: NOTES[name],
      layout: LAYOUT[name],
      width: WIDTH,
      height: HEIGHT,
      gaps: [COLUMN_GAP, ROW_GAP],
    },
  );
  const covered = await overlaps(page);
  if (covered.length) throw new Error(`${name}: nodes overlap: ${JSON.stringify(covered)}`);
  const placed = LAYOUT[name].flat().length;
  if (placed + 1 !== workflow.nodes.length) throw new Error(`${name}: LAYOUT misses a node`);
  delete workflow.extra?.ds;
  await writeFile(`${WORKFLOWS}${name}.json`, `${JSON.stringify(workflow, null, 2)}\n`);
}

// A thumbnail for the template list: both sets of pictures, and what was erased.
async function draw(page, name) {
  await dropWorkflow(page, `${WORKFLOWS}${name}.json`);
  const { status } = await run(page);
  if (status.status_str !== "success") throw new Error(`${name}: ${JSON.stringify(status)}`);
  await shownPictures(page, "SaveImage");
  const data = await page.evaluate(() => {
    const [width, height, tile, top] = [640, 360, 128, 62];
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const pen = canvas.getContext("2d");
    const nodes = window.app.graph.nodes;
    const [concept] = nodes.find((n) => n.type === "LacunaConceptSet").widgets[0].value.split("\n");
    const saved = nodes.some((node) => node.type === "LacunaSaveLoRA");
    pen.fillStyle = "#202024";
    pen.fillRect(0, 0, width, height);
    pen.fillStyle = "#f0f0f0";
    pen.textAlign = "center";
    pen.font = "24px sans-serif";
    pen.fillText(saved ? `${concept}, saved as a LoRA` : concept, width / 2, 36);
    pen.font = "18px sans-serif";
    for (const [title, left] of [["Before", 40], ["After", width - 40 - 2 * tile]]) {
      const shown = nodes.find((node) => node.type === "SaveImage" && node.title === title);
      for (const [i, image] of shown.imgs.slice(0, 4).entries()) {
        pen.drawImage(image, left + (i % 2) * tile, top + (i >> 1) * tile, tile, tile);
      }
      pen.fillText(title.toLowerCase(), left + tile, top + 2 * tile + 28);
    }
    return canvas.toDataURL("image/jpeg", 0.9);
  });
  await writeFile(`${WORKFLOWS}${name}.jpg`, Buffer.from(data.split(",")[1], "base64"));
}

const [url, ...names] = process.argv.slice(2);
const { browser, page } = await openPage(url);
for (const name of names) {
  await build(page, name);
  await draw(page, name);
}
await browser.close();
