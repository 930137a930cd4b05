// SPDX-License-Identifier: Apache-2.0
// Drops each workflow on the page and prints, as one line of JSON, what is wrong with how it looks.
//
//   node open_workflows.mjs URL SCREENSHOT_FOLDER WORKFLOW.json [...]
import { basename, join } from "node:path";
import { dropWorkflow, openPage, overlaps, unknownNodes } from "../../tools/page/page.mjs";

const [url, folder, ...workflows] = process.argv.slice(2);
const { browser, page } = await openPage(url);
try {
  const failures = [];
  page.on("pageerror", (error) => failures.push(String(error)));
  const seen = {};
  for (const workflow of workflows) {
    await dropWorkflow(page, workflow);
    const name = basename(workflow, ".json");
    seen[name] = { covered: await overlaps(page), missing: await unknownNodes(page) };
    await page.screenshot({ path: join(folder, `${name}.png`) });
  }
  console.log(JSON.stringify({ seen, failures }));
} finally {
  await browser.close();
}
