// SPDX-License-Identifier: Apache-2.0
// Writes workflows/<name>.json, the format that the page saves, from workflows/api/<name>.json, runs
// it, and draws the pictures of the nodes titled Before and After into workflows/<name>.jpg.
//
//   node build_workflows.mjs http://127.0.0.1:8188 [--no-pictures] erase_words [...]
//
// Positions are those of LAYOUT below, see layout.mjs; the page itself serialises. Keep them narrow:
// the page shows no text once it zooms out below 60 %, for 1600 pixels about 1,950 of a graph's.
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { isDeepStrictEqual } from "node:util";
import { arrange } from "./layout.mjs";
import { dropWorkflow, openPage, overlaps, run } from "./page.mjs";

const WORKFLOWS = fileURLToPath(new URL("../../workflows/", import.meta.url));
// No inline code in notes: Nodes 2.0 writes it blue on blue.
const NOTES = {
  erase_words: `Both pictures start from the same noise; only the model differs.

For a word of your own: type it into **Concept Set**, one phrase a line, *target -> what to draw instead*, and into **Prompt**. List what must stay under *preserve*. Press Run.

The edit acts on prompts that name a concept; every other prompt is drawn by the model as it was. The first run takes longer: it reads the words that must stay, once for each text encoder.

Works with SD1.x, SD2.x and SDXL checkpoints: choose yours, and set width and height to its size. The small demo model draws 64 x 64.`,
  erase_words_save_lora: `As *erase_words*, but the edit is one of the weights, and saved as a LoRA in *output/loras*, which loads in ComfyUI, A1111/Forge and diffusers like any other. Weights act on every prompt: *where* says so.

Strength 1.0 of that LoRA is the strength set in **Attention Refine**. The report says what its rank leaves out.`,
  erase_style_keep_neighbours: `One style is erased, the styles next to it are listed under *preserve* and stay. The lower pictures show one of those.

*kind* is **style**, so phrases are read in prompts about pictures and artists. Write *van gogh style -> art*, preserve the painters near him, and set both prompts.`,
  erase_100_names_from_preset: `The text in **Concept Set** is a list from the folder *presets*: a hundred names, and thirty that stay. The lower pictures show one of those. *regularization* is 100 here, about 1 for each name: with a short list lower it.

Open another list, e.g. *artists_100.json*, copy all of it into *concepts*, and change both prompts. The page *presets* of the documentation says how to write and share lists.`,
  full_pipeline_with_evaluation: `All of MACE: **Attention Refine** edits the words around the concept, **LoRA Erase** trains one small LoRA for each concept, **LoRA Fuse** joins them, **Evaluate Erasure** draws before and after and counts.

It draws two pictures of everything, to be quick: raise *prompts* and *images per prompt* for numbers to rely on.

The numbers here fit the small demo model. For SD1.5: 512 x 512, 50 steps, learning rate 0.001, 8 images.

The result is saved twice: as a LoRA for any program, and as a bundle, to which *add_concept_to_bundle* adds more later.`,
  add_concept_to_bundle: `First run *full_pipeline_with_evaluation*: it saves the bundle that is opened here. Only the new concept is trained; what is in the bundle is fused with it.

The file name is one within ComfyUI's output folder. Save the new bundle, and next time open that one.`,
  compare_methods: `The same noise and the same concept, four ways: unedited, *uce* (seconds), *mace* alone (its first half), and *mace* with a trained LoRA.

Below, **Evaluate Erasure** at level *preflight* says what each edit left in the weights. For pictures and counts, set *level* to quick. Change the prompt to a neighbour to see what each method costs.`,
};
const TWO_PROMPTS = [
  ["1", "7"], ["2", "4", "5", "6"], ["3", "20"], ["8", "9", "10", "11"], ["12", "13", "14", "15"],
  ["16", "17", "18", "19"],
];
const LAYOUT = {
  erase_words: [["1", "6"], ["2", "4", "5"], ["3", "13"], ["7", "8", "9", "10"], ["11", "12"]],
  erase_words_save_lora: [
    ["1", "6"], ["2", "4", "5"], ["3", "13"], ["7", "8", "9", "10"], ["11", "12", "14"],
  ],
  erase_style_keep_neighbours: TWO_PROMPTS,
  erase_100_names_from_preset: TWO_PROMPTS,
  full_pipeline_with_evaluation: [["1", "2"], ["3", "9"], ["4"], ["5", "7", "8"], ["6"]],
  add_concept_to_bundle: [
    ["1", "9"], ["3", "2", "7", "8"], ["4"], ["5"], ["6", "16"], ["10", "11"],
    ["12", "13", "17"], ["14", "15"],
  ],
  compare_methods: [
    ["1", "9"], ["2", "7", "8"], ["3", "4"], ["5"], ["6"], ["10", "11", "12", "13"],
    ["14", "15", "16", "17"], ["18", "19", "20", "21"], ["22", "24"], ["23", "25"],
  ],
};
const HEADINGS = {
  erase_words: "hamburger -> apple",
  erase_words_save_lora: "hamburger -> apple, saved as a LoRA",
  erase_style_keep_neighbours: "one style erased, its neighbour kept",
  erase_100_names_from_preset: "100 flags erased, the others kept",
  full_pipeline_with_evaluation: "hamburger -> apple, with evaluation",
  add_concept_to_bundle: "owl -> tree, added to a bundle",
  compare_methods: "hamburger -> apple, three methods",
};
// Which pictures a thumbnail shows, by title of their node; without an entry the evaluation's sheet.
const BEFORE_AFTER = ["Before", "After"];
const PICTURES = {
  erase_words: BEFORE_AFTER,
  erase_words_save_lora: BEFORE_AFTER,
  erase_style_keep_neighbours: ["Before", "After", "Neighbour before", "Neighbour after"],
  erase_100_names_from_preset: ["Before", "After", "Kept before", "Kept after"],
  add_concept_to_bundle: BEFORE_AFTER,
  compare_methods: ["Before", "uce", "mace", "mace + LoRA"],
};

async function build(page, name) {
  const api = JSON.parse(await readFile(`${WORKFLOWS}api/${name}.json`, "utf8"));
  await arrange(page, api, name, LAYOUT[name]);
  const workflow = await page.evaluate(
    ({ note, bottom, gap }) => {
      const comment = window.LiteGraph.createNode("MarkdownNote");
      window.app.graph.add(comment);
      comment.title = "Read me";
      const lowest = window.app.graph.nodes.find((node) => String(node.id) === bottom);
      comment.pos = [lowest.pos[0], lowest.pos[1] + lowest.size[1] + gap];
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
    { note: NOTES[name], bottom: LAYOUT[name][0].at(-1), gap: 70 },
  );
  const covered = await overlaps(page);
  if (covered.length) throw new Error(`${name}: nodes overlap: ${JSON.stringify(covered)}`);
  const placed = LAYOUT[name].flat().length;
  if (placed + 1 !== workflow.nodes.length) throw new Error(`${name}: LAYOUT misses a node`);
  delete workflow.extra?.ds;
  await writeFile(`${WORKFLOWS}${name}.json`, `${JSON.stringify(workflow, null, 2)}\n`);
}

const nodesOf = (graph) =>
  Object.entries(graph).map(([id, { class_type, inputs }]) => [id, class_type, inputs]);

// The history entry of a run of this very graph: one that this server has made, or a new one.
async function finishedRun(page, name, api) {
  const history = await page.evaluate(async () => (await fetch("/history")).json());
  const done = Object.values(history).find(
    ({ prompt, status }) =>
      status?.status_str === "success" && isDeepStrictEqual(nodesOf(prompt[2]), nodesOf(api)),
  );
  if (done) return done;
  await dropWorkflow(page, `${WORKFLOWS}${name}.json`);
  const entry = await run(page);
  if (entry.status.status_str !== "success") throw new Error(`${name}: ${JSON.stringify(entry)}`);
  return entry;
}

// A thumbnail for the template list: what was erased, and the pictures of a run.
async function draw(page, name) {
  const api = JSON.parse(await readFile(`${WORKFLOWS}api/${name}.json`, "utf8"));
  const { outputs } = await finishedRun(page, name, api);
  const shown = Object.entries(outputs)
    .filter(([id, output]) => output.images && api[id].class_type !== "LacunaLoRAErase")
    .map(([id, output]) => ({ title: api[id]._meta.title, images: output.images }));
  const data = await page.evaluate(
    async ({ shown, titles, heading }) => {
      const [width, height, top] = [640, 360, 62];
      const canvas = Object.assign(document.createElement("canvas"), { width, height });
      const pen = canvas.getContext("2d");
      pen.fillStyle = "#202024";
      pen.fillRect(0, 0, width, height);
      pen.fillStyle = "#f0f0f0";
      pen.textAlign = "center";
      pen.font = "24px sans-serif";
      pen.fillText(heading, width / 2, 36, width - 20);
      pen.font = "18px sans-serif";
      const load = (image) =>
        new Promise((resolve, reject) => {
          const picture = new Image();
          picture.onload = () => resolve(picture);
          picture.onerror = reject;
          picture.src = `/view?${new URLSearchParams(image)}`;
        });
      if (!titles) {
        const page = await load(shown[0].images[0]);
        // Its top, as wide as there is room: the whole sheet would be too small to read.
        const [w, h] = [width - 40, height - top];
        pen.drawImage(page, 0, 0, page.width, (h * page.width) / w, 20, top, w, h);
        return canvas.toDataURL("image/jpeg", 0.9);
      }
      const gap = 24;
      const group = Math.min(256, (width - 2 * gap) / titles.length - gap);
      const y = top + (256 - group) / 2;
      const left = (width - titles.length * (group + gap) + gap) / 2;
      for (const [column, title] of titles.entries()) {
        const x = left + column * (group + gap);
        const { images } = shown.find((item) => item.title === title);
        for (const [i, image] of images.slice(0, 4).entries()) {
          const tile = group / 2;
          pen.drawImage(await load(image), x + (i % 2) * tile, y + (i >> 1) * tile, tile, tile);
        }
        pen.fillText(title.toLowerCase(), x + group / 2, y + group + 28, group + gap);
      }
      return canvas.toDataURL("image/jpeg", 0.9);
    },
    { shown, titles: PICTURES[name], heading: HEADINGS[name] },
  );
  await writeFile(`${WORKFLOWS}${name}.jpg`, Buffer.from(data.split(",")[1], "base64"));
}

const [url, ...rest] = process.argv.slice(2);
const names = rest.filter((name) => name !== "--no-pictures");
const { browser, page } = await openPage(url);
for (const name of names) {
  await build(page, name);
  if (names.length === rest.length) await draw(page, name);
}
await browser.close();
