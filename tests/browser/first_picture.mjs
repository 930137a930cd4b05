// SPDX-License-Identifier: Apache-2.0
// A first visit, filmed: three actions to the first forgotten picture, then a word of one's own, then
// the saved picture dropped on the page. Prints what was seen as one line of JSON.
//
//   node first_picture.mjs URL FILM_PREFIX OUTPUT_FOLDER
//
// FILM_PREFIX_<n>.png is the page after action n. Only what a user can do with mouse and keyboard is
// done to the page; window.app is read, not called. The one exception is the last drop: Chromium takes
// no files from outside in a test.
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { dropFile, greetedPage, run } from "../../tools/page/page.mjs";

const [url, film, output] = process.argv.slice(2);
const { browser, page } = await greetedPage(url);
const failures = [];
page.on("pageerror", (error) => failures.push(String(error)));

let actions = 0;
async function shoot() {
  await page.waitForTimeout(1000); // animations of the page
  await page.screenshot({ path: `${film}_${actions}.png` });
}

async function act(action) {
  await action();
  actions += 1;
  await shoot();
  const told = page.locator(
    ".p-toast-message, [role=alert], [data-testid=error-overlay], .p-dialog, .comfy-modal:visible",
  );
  for (const text of await told.allInnerTexts()) {
    if (text.trim() && !text.includes("erase_words")) failures.push(`after ${actions}: ${text}`);
  }
}

// Where a point of the graph is on the screen.
const onScreen = (x, y) =>
  page.evaluate(
    ([x, y]) => {
      const { scale, offset } = window.app.canvas.ds;
      const box = window.app.canvas.canvas.getBoundingClientRect();
      return [box.x + (x + offset[0]) * scale, box.y + (y + offset[1]) * scale];
    },
    [x, y],
  );

// Clicks the text field of a node, and types over what is in it.
async function type(title, text) {
  const field = await page.evaluate((title) => {
    const node = window.app.graph.nodes.find((node) => node.title === title);
    const { y, computedHeight } = node.widgets[0];
    return [node.pos[0] + node.size[0] / 2, node.pos[1] + y + computedHeight / 2];
  }, title);
  await page.mouse.click(...(await onScreen(...field)));
  await page.keyboard.press("Control+a");
  await page.keyboard.type(text);
}

// Sizes of what the nodes Before and After show: painted in the classic renderer, elements in Nodes 2.0.
async function pictures() {
  const shown = () =>
    page.evaluate(() => {
      const sizes = {};
      for (const title of ["Before", "After"]) {
        const node = window.app.graph.nodes.find((n) => n.title === title && n.type === "SaveImage");
        const elements = document.querySelectorAll(`[data-node-id="${node.id}"] img`);
        const images = elements.length ? [...elements] : (node.imgs ?? []);
        sizes[title] = images.filter((i) => i.complete).map((i) => [i.naturalWidth, i.naturalHeight]);
      }
      return sizes;
    });
  for (const end = Date.now() + 20_000; Date.now() < end; await page.waitForTimeout(250)) {
    const sizes = await shown();
    if (Object.values(sizes).every((images) => images.length)) return sizes;
  }
  throw new Error(`no pictures: ${JSON.stringify(await shown())}`);
}

async function pressRun() {
  const history = await run(page);
  if (history.status.status_str !== "success") failures.push(JSON.stringify(history.status));
  return pictures();
}

try {
  await shoot();
  await act(() => page.getByText("lacuna", { exact: true }).first().click());
  await act(async () => {
    await page.getByText("erase_words", { exact: true }).first().click();
    await page.waitForFunction(() => window.app.graph.nodes.some((node) => node.title === "After"));
  });
  const seen = { film: film.split("/").at(-1) };
  await act(async () => (seen.first = await pressRun()));
  seen.actions = actions;
  await act(() => type("Concept Set", "owl -> tree"));
  await act(() => type("Prompt", "a photo of an owl"));
  await act(async () => (seen.second = await pressRun()));
  seen.concepts = await page.evaluate(
    () => window.app.graph.nodes.find((node) => node.title === "Concept Set").widgets[0].value,
  );

  const saved = (await readdir(join(output, "lacuna"))).filter((name) => name.startsWith("after"));
  await page.keyboard.press("Escape"); // out of the text field
  await act(async () => {
    await page.locator(".new-blank-workflow-button").click();
    await page.waitForFunction(() => window.app.graph.nodes.every((node) => node.title !== "After"));
  });
  await act(async () => {
    await dropFile(page, join(output, "lacuna", saved.sort().at(-1)), "image/png");
    await page.waitForFunction(() => window.app.graph.nodes.some((node) => node.title === "After"));
    seen.restored = await page.evaluate(() => {
      const node = window.app.graph.nodes.find((node) => node.title === "Concept Set");
      return { nodes: window.app.graph.nodes.length, concepts: node?.widgets[0].value };
    });
  });
  console.log(JSON.stringify({ ...seen, failures }));
} finally {
  await browser.close();
}
