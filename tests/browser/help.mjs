// SPDX-License-Identifier: Apache-2.0
// Opens the help of each node as a user does, by the i above the selected node, and prints what the
// panel shows as one line of JSON.
//
//   node help.mjs URL FILE_PREFIX NODE_ID [...]
//
// FILE_PREFIX<node id>.png is the page, high enough for a whole help page.
import { openPage } from "../../tools/page/page.mjs";

const [url, prefix, ...ids] = process.argv.slice(2);
const { browser, page } = await openPage(url, { width: 1600, height: 2600 });
try {
  const seen = {};
  for (const id of ids) {
    const title = await page.evaluate((id) => {
      const { graph, canvas } = window.app;
      graph.clear();
      canvas.ds.scale = 1;
      canvas.ds.offset = [0, 0];
      const node = window.LiteGraph.createNode(id);
      graph.add(node);
      node.pos = [500, 300];
      canvas.setDirty(true, true);
      return node.title;
    }, id);
    await page.waitForTimeout(500);
    const box = await page.locator("#graph-canvas").boundingBox();
    await page.mouse.click(box.x + 560, box.y + 285); // its title bar
    await page.getByLabel("Node Info").or(page.getByTestId("info-button")).first().click();
    const heading = page.getByRole("heading", { level: 1, name: title, exact: true });
    await heading.waitFor({ timeout: 15_000 });
    await page.waitForFunction(
      () => [...document.querySelectorAll("img[src*='/docs/']")].some((i) => i.naturalWidth > 0),
      null,
      { timeout: 15_000 },
    );
    await page.waitForTimeout(500);
    const panel = heading.locator("xpath=..");
    seen[id] = {
      rows: await panel.locator("table tr").count(),
      pictures: await panel.locator("img").evaluateAll((all) => all.map((i) => i.naturalWidth)),
      // Markdown that was not understood stays as it was typed.
      raw: (await panel.innerText()).split("\n").filter((line) => /^\|.*\||^#|\]\(|\*\*/.test(line)),
      cut: await panel.evaluate((element) => {
        const right = element.getBoundingClientRect().right + 1;
        const parts = [...element.querySelectorAll("table, pre, img")];
        return parts
          .filter((part) => part.getBoundingClientRect().right > right || part.scrollWidth > part.clientWidth + 1)
          .map((part) => part.textContent.slice(0, 40));
      }),
    };
    await page.screenshot({ path: `${prefix}${id}.png` });
  }
  console.log(JSON.stringify(seen));
} finally {
  await browser.close();
}
