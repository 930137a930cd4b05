// SPDX-License-Identifier: Apache-2.0
// What widgets hold in a new node, in a graph that was saved before they were there, and in one saved
// after: one line of JSON.
//
//   node saved_graphs.mjs URL NODE_ID
import { openPage } from "../../tools/page/page.mjs";

const [url, id] = process.argv.slice(2);
const { browser, page } = await openPage(url, { width: 1400, height: 900 });
try {
  const seen = await page.evaluate(async (id) => {
    const { app, LiteGraph } = window;
    const widgets = (node) => Object.fromEntries(node.widgets.map((each) => [each.name, each.value]));
    app.graph.clear();
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    const fresh = widgets(node);
    const saved = app.graph.serialize();
    const older = structuredClone(saved);
    older.nodes[0].widgets_values = older.nodes[0].widgets_values.slice(0, -2);
    await app.loadGraphData(older);
    const old = widgets(app.graph._nodes[0]);
    await app.loadGraphData(saved);
    return { fresh, old, again: widgets(app.graph._nodes[0]) };
  }, id);
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
