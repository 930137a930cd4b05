// SPDX-License-Identifier: Apache-2.0
// Opens a workflow in the page, runs it, and prints what is seen as one line of JSON.
//
//   node run_workflow.mjs URL WORKFLOW.json SCREENSHOT.png
import {
  dropWorkflow, fitView, openPage, overlaps, run, shownPictures, unknownNodes,
} from "../../tools/page/page.mjs";

const [url, workflow, screenshot] = process.argv.slice(2);
const { browser, page } = await openPage(url);
try {
  const failures = [];
  page.on("pageerror", (error) => failures.push(String(error)));
  await dropWorkflow(page, workflow);
  const covered = await overlaps(page);
  const missing = await unknownNodes(page);
  const history = await run(page);
  const pictures = await shownPictures(page, "SaveImage");
  const report = await page.evaluate(
    () => window.app.graph.nodes.find((node) => node.type === "PreviewAny").widgets[0].value,
  );
  await fitView(page);
  await page.waitForTimeout(1000);
  await page.screenshot({ path: screenshot });
  const status = history.status.status_str;
  console.log(JSON.stringify({ status, pictures, covered, missing, report, failures }));
} finally {
  await browser.close();
}
