// SPDX-License-Identifier: Apache-2.0
// Loads a graph in API format, runs it in the classic renderer or in Nodes 2.0, and prints what
// Evaluate Erasure shows as one line of JSON.
//
//   node evaluate.mjs URL GRAPH.json SCREENSHOT.png classic|vue
import { readFile } from "node:fs/promises";
import { openPage, run } from "../../tools/page/page.mjs";

const [url, file, screenshot, renderer] = process.argv.slice(2);
const graph = JSON.parse(await readFile(file, "utf8"));
const { browser, page } = await openPage(url, { width: 1500, height: 1400 });
try {
  const failures = [];
  page.on("pageerror", (error) => failures.push(String(error)));
  await page.evaluate(
    async ([graph, vue]) => {
      await window.app.extensionManager.setting.set("Comfy.VueNodes.Enabled", vue);
      await window.app.loadApiJson(graph, "evaluation");
    },
    [graph, renderer === "vue"],
  );
  await page.waitForFunction(
    (count) => window.app.graph.nodes.length === count, Object.keys(graph).length,
  );
  // As a user would, the node is drawn large, and the rest out of its way.
  await page.evaluate(() => {
    for (const [i, node] of window.app.graph.nodes.entries()) node.pos = [-3000, 400 * i];
    const node = window.app.graph.nodes.find((n) => n.type === "LacunaEvaluateErasure");
    node.pos = [0, 0];
    node.setSize([1050, 1900]);
    const text = window.app.graph.nodes.find((n) => n.type === "PreviewAny");
    text.pos = [1150, 0];
    text.setSize([420, 700]);
  });
  const history = await run(page);
  await page.waitForTimeout(3000);
  const show = async (x, y, scale) => {
    await page.evaluate(
      ([x, y, scale]) => {
        const view = window.app.canvas.ds;
        view.scale = scale;
        view.offset[0] = x;
        view.offset[1] = y;
        window.app.canvas.setDirty(true, true);
      },
      [x, y, scale],
    );
    await page.waitForTimeout(1500);
  };
  await show(100, 150, 0.65);
  // Nodes 2.0 makes elements of pictures, the classic renderer paints them on the canvas.
  const shown = await page.evaluate(() => {
    const node = window.app.graph.nodes.find((n) => n.type === "LacunaEvaluateErasure");
    const painted = (node.imgs ?? []).map((i) => [i.naturalWidth, i.naturalHeight]);
    const elements = [...document.querySelectorAll("img")]
      .filter((i) => /[/?&](view|filename)/.test(i.src) && i.naturalWidth > 500)
      .map((i) => [i.naturalWidth, i.naturalHeight]);
    const text = window.app.graph.nodes.find((n) => n.type === "PreviewAny");
    const values = (text.widgets ?? []).map((widget) => String(widget.value));
    return { painted, elements, values };
  });
  await page.screenshot({ path: screenshot });
  console.log(JSON.stringify({ status: history.status.status_str, ...shown, failures }));
} finally {
  await browser.close();
}
