// SPDX-License-Identifier: Apache-2.0
// Changes one widget of a workflow, presses Run, and counts how often the sentence is shown.
//
//   node bad_input.mjs URL WORKFLOW.json SCREENSHOT.png '{"title", "widget", "value"}' SENTENCE
import { dropWorkflow, openPage } from "../../tools/page/page.mjs";

const [url, workflow, screenshot, change, sentence] = process.argv.slice(2);
const { browser, page } = await openPage(url);
try {
  await dropWorkflow(page, workflow);
  await page.evaluate(({ title, widget, value }) => {
    const node = window.app.graph.nodes.find((node) => node.title === title);
    node.widgets.find((item) => item.name === widget).value = value;
    // ComfyUI 0.3 shows no message while another output, here the unedited picture, can still run.
    const NEVER = 2;
    for (const other of window.app.graph.nodes) if (other.title === "Before") other.mode = NEVER;
  }, JSON.parse(change));
  await page.getByTestId("queue-button").click();
  const shown = page.getByText(sentence);
  await shown.first().waitFor({ timeout: 15_000 });
  await page.waitForTimeout(500);
  await page.screenshot({ path: screenshot });
  const text = await page.evaluate(() => document.body.innerText);
  console.log(JSON.stringify({ times: text.split(sentence).length - 1 }));
} finally {
  await browser.close();
}
