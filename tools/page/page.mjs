// SPDX-License-Identifier: Apache-2.0
// ComfyUI's page in a headless Chromium.
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import { chromium } from "playwright-core";

const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
const READY_MS = 90_000;

// The page as it greets a visitor: on a first visit with the template browser.
export async function greetedPage(url, { width = 1600, height = 1000 } = {}) {
  const browser = await chromium.launch({
    executablePath: CHROMIUM,
    args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
  });
  const page = await browser.newPage({ viewport: { width, height } });
  // ComfyUI's own templates are a package of up to 800 MB. Where it is not installed, their list is
  // empty: without any list, ComfyUI 0.3 opens no template of node packs either.
  await page.route(/\/templates\/index[\w-]*\.json/, async (route) => {
    const answer = await route.fetch();
    await route.fulfill(answer.ok() ? { response: answer } : { json: [] });
  });
  await page.goto(url, { timeout: READY_MS });
  await page.waitForFunction(() => window.app?.graph && window.app?.extensionManager, null, {
    timeout: READY_MS,
  });
  await page.getByTestId("queue-button").waitFor({ timeout: READY_MS });
  await page.waitForTimeout(1500);
  return { browser, page };
}

export async function openPage(url, size) {
  const { browser, page } = await greetedPage(url, size);
  await page.keyboard.press("Escape");
  await page.waitForTimeout(500);
  return { browser, page };
}

// As a user does it: drop the file on the canvas.
export async function dropFile(page, path, type) {
  const transfer = await page.evaluateHandle(
    ({ base64, name, type }) => {
      const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name, { type }));
      return data;
    },
    { base64: await readFile(path, "base64"), name: basename(path), type },
  );
  await page.dispatchEvent("#graph-canvas", "drop", { dataTransfer: transfer });
}

export async function dropWorkflow(page, path) {
  const count = JSON.parse(await readFile(path, "utf8")).nodes.length;
  await dropFile(page, path, "application/json");
  await page.waitForFunction((count) => window.app.graph.nodes.length === count, count);
  await page.waitForTimeout(500);
  await fitView(page);
}

// The whole graph between the page's bars. Positions, not the nodes' own rectangles: those are as
// old as the last frame. 30: the title bar above a node.
export async function fitView(page) {
  await page.evaluate(() => {
    const margin = { left: 70, top: 120, right: 170, bottom: 90 };
    const boxes = window.app.graph.nodes.map((node) => [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]);
    const left = Math.min(...boxes.map((box) => box[0]));
    const top = Math.min(...boxes.map((box) => box[1]));
    const wide = Math.max(...boxes.map((box) => box[0] + box[2])) - left;
    const high = Math.max(...boxes.map((box) => box[1] + box[3])) - top;
    const view = window.app.canvas.ds;
    view.scale = Math.min(
      (window.innerWidth - margin.left - margin.right) / wide,
      (window.innerHeight - margin.top - margin.bottom) / high,
      1,
    );
    view.offset[0] = margin.left / view.scale - left;
    view.offset[1] = margin.top / view.scale - top;
    window.app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(300);
}

// Pairs of nodes that cover each other, by title.
export function overlaps(page) {
  return page.evaluate(() => {
    const nodes = window.app.graph.nodes.map((node) => {
      const [x, y, w, h] = [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30];
      return { title: node.title, x, y, w, h };
    });
    const pairs = [];
    for (const [i, a] of nodes.entries()) {
      for (const b of nodes.slice(i + 1)) {
        if (a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h) {
          pairs.push([a.title, b.title]);
        }
      }
    }
    return pairs;
  });
}

// Types of nodes that this ComfyUI does not have; notes live in the page only.
export function unknownNodes(page) {
  return page.evaluate(async () => {
    const known = await (await fetch("/object_info")).json();
    const types = window.app.graph.nodes.map((node) => node.type);
    return types.filter((type) => !(type in known) && type !== "MarkdownNote");
  });
}

// Presses Run; resolves with the prompt's history entry.
export async function run(page, timeoutMs = 600_000) {
  const queued = page.waitForResponse(
    (response) => response.url().endsWith("/prompt") && response.request().method() === "POST",
  );
  await page.getByTestId("queue-button").click();
  const answer = await (await queued).json();
  if (!answer.prompt_id) throw new Error(`not queued: ${JSON.stringify(answer)}`);
  const path = `/history/${answer.prompt_id}`;
  for (const end = Date.now() + timeoutMs; Date.now() < end; ) {
    const history = await page.evaluate(async (path) => (await fetch(path)).json(), path);
    if (history[answer.prompt_id]) return history[answer.prompt_id];
    await page.waitForTimeout(500);
  }
  throw new Error(`the prompt did not end in ${timeoutMs} ms`);
}

// Sizes of the pictures that each node of `type` shows, by node title.
export async function shownPictures(page, type, timeoutMs = 30_000) {
  await page.waitForFunction(
    (type) =>
      window.app.graph.nodes
        .filter((node) => node.type === type)
        .every((node) => node.imgs?.length && node.imgs.every((image) => image.complete)),
    type,
    { timeout: timeoutMs },
  );
  return page.evaluate(
    (type) =>
      Object.fromEntries(
        window.app.graph.nodes
          .filter((node) => node.type === type)
          .map((node) => [node.title, node.imgs.map((i) => [i.naturalWidth, i.naturalHeight])]),
      ),
    type,
  );
}
