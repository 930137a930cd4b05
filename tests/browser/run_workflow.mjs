// SPDX-License-Identifier: Apache-2.0
// Opens a workflow in the page, runs it, and prints what is seen as one line of JSON.
//
//   node run_workflow.mjs URL WORKFLOW.json SCREENSHOT.png [NODE_TITLE=WIDGET=VALUE ...]
import {
  dropWorkflow, fitView, openPage, overlaps, run, shownPictures,
} from "../../tools/page/page.mjs";

const [url, workflow, screenshot, ...changes] = process.argv.slice(2);
const { browser, page } = await openPage(url);
try {
  const failures = [];
  page.on("pageerror", (error) => failures.push(String(error)));
  await dropWorkflow(page, workflow);
  for (const change of changes) {
    const [title, widget, value] = change.split("=");
    await page.evaluate(
      ({ title, widget, value }) => {
        const node = window.app.graph.nodes.find((node) => node.title === title);
        node.widgets.find((item) => item.name === widget).value = value;
      },
      { title, widget, value },
    );
  }
  const covered = await overlaps(page);
  const unknown = await page.evaluate(() =>
    window.app.graph.nodes.filter((node) => node.has_errors || !node.constructor.nodeData)
      .map((node) => node.type),
  );
  const history = await run(page);
  const pictures = await shownPictures(page, "SaveImage");
  await fitView(page);
  await page.waitForTimeout(1000);
  await page.screenshot({ path: screenshot });
  const status = history.status.status_str;
  console.log(JSON.stringify({ status, pictures, covered, unknown, failures }));
} finally {
  await browser.close();
}
