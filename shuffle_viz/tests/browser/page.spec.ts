/**
 * The page in a real browser, opened from a file: run by `pytest tests/test_shuffle_viz.py`, which names the browser
 * (CHROMIUM) and a plan that `tiledbsoma-ml plan --json` wrote (PLAN).
 */

import AxeBuilder from "@axe-core/playwright";
import { expect, test as base, type Page } from "@playwright/test";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const PAGE = new URL("../../dist/index.html", import.meta.url).href;
const vectors = JSON.parse(readFileSync(new URL("../../src/golden/vectors.json", import.meta.url), "utf8"));
const SMALL = "#rows=64&chunk=4&ioBatch=16&miniBatch=4&tile=8&labels=4";

/** Fails a test whose page logs an error or a warning, or asks the network for anything. */
const test = base.extend<{ quiet: void }>({
  quiet: [
    async ({ page }, use) => {
      const problems: string[] = [];
      page.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
      page.on("pageerror", (error) => problems.push(String(error)));
      page.on("request", (request) => /^(file|data|blob):/.test(request.url()) || problems.push(request.url()));
      await use();
      expect(problems).toEqual([]);
    },
    { auto: true },
  ],
});

async function open(page: Page, address = ""): Promise<void> {
  await page.goto(PAGE + address);
  await expect(page.locator("canvas")).toHaveCount(4);
}

/** Everything that is drawn, as one text. */
function picture(page: Page): Promise<string> {
  return page.evaluate(() => [...document.querySelectorAll("canvas")].map((canvas) => canvas.toDataURL()).join());
}

function step(page: Page, title: string) {
  return page.getByRole("slider", { name: title });
}

/** Go through a step with the keyboard, and return the rows that it names, in order. */
async function rowsOf(page: Page, title: string, n: number): Promise<number[]> {
  const slider = step(page, title);
  await slider.focus();
  await page.keyboard.press("Home");
  const rows: number[] = [];
  for (let k = 0; k < n; k++) {
    await expect(slider).toHaveAttribute("aria-valuenow", String(k + 1));
    rows.push(Number(/^Row ([\d,]+):/.exec((await slider.getAttribute("aria-valuetext"))!)![1].replaceAll(",", "")));
    await page.keyboard.press("ArrowRight");
  }
  return rows;
}

test("it loads, and answers which chunk size to take", async ({ page }) => {
  await open(page);
  await expect(page.getByRole("heading", { level: 1 })).toHaveText("How rows are shuffled");
  const advice = page.getByRole("region", { name: "Which chunk size, and why" });
  await expect(advice).toContainText("every tile of a query of 20,000,000 rows is decoded 25.8 times an epoch");
  await expect(advice).toContainText("“auto” does that: with 2 GiB it takes chunks of 256");
  await expect(page.getByRole("region", { name: "Query rows" })).toContainText("100,000 rows in 49 tiles");
});

test.describe("the order that is drawn is the one that Python yields", () => {
  const small = vectors.orders.filter((order: { rows?: number[][] }) => order.rows);
  for (const { setup, rows } of [small[0], small[1], small[2], small.at(-1), small.at(-2)]) {
    test(JSON.stringify(setup), async ({ page }) => {
      await open(page, `#${new URLSearchParams({ ...setup, tile: 4 })}`);
      expect(await rowsOf(page, "Mini-batches", rows.flat().length)).toEqual(rows.flat());
    });
  }
});

test("controls change the picture, and only when they change something", async ({ page }) => {
  await open(page, SMALL);
  let before = await picture(page);
  for (const [label, value] of [["Seed", "7"], ["Epoch", "3"], ["Chunk", "2"], ["IO batch", "32"], ["Mini-batch", "8"], ["Ranks", "2"], ["Workers", "3"], ["Tile", "16"], ["Rows", "50"]]) {
    await page.getByRole("textbox", { name: label }).first().fill(value);
    await expect.poll(() => picture(page), label).not.toBe(before);
    before = await picture(page);
  }
  await page.getByLabel("Scope").selectOption("global");
  await expect.poll(() => picture(page)).not.toBe(before);
  before = await picture(page);
  await page.getByLabel("Colour rows by").selectOption("label");
  await expect.poll(() => picture(page)).not.toBe(before);
  before = await picture(page);
  await page.getByRole("textbox", { name: "Seed" }).fill("007");
  await page.waitForTimeout(200);
  expect(await picture(page)).toBe(before);
});

test("presets are one click away", async ({ page }) => {
  await open(page);
  await page.getByRole("button", { name: "8 GPUs, global" }).click();
  await expect(page.getByRole("textbox", { name: "Ranks" })).toHaveValue("8");
  await expect(page.getByRole("region", { name: "Ranks and workers" }).first()).toContainText("Scope “global”");
  await page.getByRole("button", { name: "Small" }).click();
  await expect(page.getByRole("region", { name: "Query rows" })).toContainText("64 rows in 8 tiles");
});

test("a shared address restores the view", async ({ page, context }) => {
  await open(page, SMALL);
  await page.getByRole("textbox", { name: "Seed" }).fill("340282366920938463463374607431768211455");
  await page.getByLabel("Scope").selectOption("global");
  await page.getByRole("button", { name: "Next mini-batch" }).click();
  await page.getByRole("button", { name: "Next mini-batch" }).click();
  await step(page, "IO batches").focus();
  await page.keyboard.press("End");
  await expect(page).toHaveURL(/at=2/);
  await expect(page).toHaveURL(/row=\d/);
  const drawn = await picture(page);
  const told = await page.locator(".way-text").textContent();

  const other = await context.newPage();
  await open(other, new URL(page.url()).hash);
  await expect(other.getByRole("textbox", { name: "Seed" })).toHaveValue("340282366920938463463374607431768211455");
  await expect(other.locator(".way-text")).toHaveText(told!);
  await expect.poll(() => picture(other)).toBe(drawn);
});

test("an address that is changed by hand is followed, and what is broken in it is told", async ({ page }) => {
  await open(page, SMALL);
  await page.evaluate(() => (location.hash = "#rows=32&chunk=4&ioBatch=16&tile=8&miniBatch=none"));
  await expect(page.getByRole("region", { name: "Query rows" })).toContainText("32 rows in 4 tiles");
  await expect(page.getByRole("alert")).toHaveText("In the address: Mini-batch must be a whole number from 1 to 100,000, not “none”; try 1,024.");
});

test("a bad value is told beside its field, and loses nothing", async ({ page }) => {
  await open(page, SMALL);
  await expect(page).toHaveURL(/chunk=4.*scanNs=/); // what the page has written, with every setting
  const before = await picture(page);
  const url = page.url();
  const chunk = page.getByRole("textbox", { name: "Chunk" });
  for (const [typed, message] of [
    ["0", "Chunk must be a whole number from 1 to 100,000, not “0”; try 64."],
    ["", "Chunk must be a whole number from 1 to 100,000, not “”; try 64."],
    ["six", "Chunk must be a whole number from 1 to 100,000, not “six”; try 64."],
    ["5", "IO batch 16 must be a multiple of the chunk, 5; try 20."],
  ]) {
    await chunk.fill(typed);
    await expect(chunk).toHaveAttribute("aria-invalid", "true");
    await expect(chunk).toHaveAccessibleDescription(message);
    await expect(chunk).toHaveValue(typed);
  }
  await page.waitForTimeout(200);
  expect(await picture(page)).toBe(before);
  expect(page.url()).toBe(url);
  await chunk.fill("8");
  await expect(chunk).toHaveAttribute("aria-invalid", "false");
  await expect.poll(() => picture(page)).not.toBe(before);
});

test("a row is followed by pointing at it, and pinned by a click", async ({ page }) => {
  await open(page, SMALL);
  const rings = page.locator(".ring");
  await step(page, "Query rows").hover({ position: { x: 15, y: 15 } });
  await expect(page.locator(".way-text")).toContainText("Row 0: tile 1 of 8 → chunk");
  await expect(rings).toHaveCount(4);
  await expect(page.locator(".way polyline")).toHaveCount(1);
  await page.mouse.move(5, 5);
  await expect(rings).toHaveCount(0);
  await step(page, "Query rows").click({ position: { x: 15, y: 15 } });
  await page.mouse.move(5, 5);
  await expect(rings).toHaveCount(4);
  await page.keyboard.press("Escape");
  await expect(rings).toHaveCount(0);
});

test("it plays, pauses, and goes step by step with the keyboard", async ({ page }) => {
  await open(page, SMALL);
  const slider = page.getByRole("slider", { name: "Mini-batch", exact: true });
  const told = page.locator(".player output");
  const whole = await picture(page);
  await page.getByRole("button", { name: "Play" }).click();
  await expect(told).toContainText(/Mini-batch \d+ of 16/); // which one, a busy machine decides
  await page.getByRole("button", { name: "Pause" }).click();
  expect(await picture(page)).not.toBe(whole);
  await slider.focus();
  await page.keyboard.press("End");
  await expect(told).toContainText("Mini-batch 16 of 16");
  await page.keyboard.press("ArrowLeft");
  await expect(slider).toHaveAttribute("aria-valuetext", "mini-batch 15 of 16");
  await page.keyboard.press("Home");
  await expect.poll(() => picture(page)).toBe(whole);
});

test("a hundred thousand rows are drawn, stepped through and followed", async ({ page }) => {
  await open(page, "#rows=100000&ranks=4&workers=2&scope=global");
  const whole = await picture(page);
  await page.getByRole("button", { name: "Next mini-batch" }).click();
  await expect.poll(() => picture(page)).not.toBe(whole);
  await step(page, "Mini-batches").focus();
  await page.keyboard.press("End");
  await expect(page.locator(".way-text")).toContainText("mini-batch 25 of 25 of rank 3");
});

// Plans ---------------------------------------------------------------------------------------------------

const PLAN = process.env["PLAN"] ?? "";
test.beforeAll(() => expect(PLAN, "PLAN must name a plan; run pytest tests/test_shuffle_viz.py").not.toBe(""));

/** Drop a file on the page. */
async function drop(page: Page, text: string): Promise<void> {
  const data = await page.evaluateHandle((content) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([content], "plan.json", { type: "application/json" }));
    return transfer;
  }, text);
  await page.dispatchEvent("main", "drop", { dataTransfer: data });
}

test("a plan that is dropped is drawn as it is", async ({ page }) => {
  const text = readFileSync(PLAN, "utf8");
  const plan = JSON.parse(text);
  await open(page, SMALL);
  await drop(page, text);
  await expect(page.getByRole("status").first()).toContainText("Drawn as it is in the plan plan.json");
  const ofRank = plan.parts.filter((part: { rank: number }) => part.rank === 0).map((part: { mini_batches: number[][] }) => part.mini_batches);
  const inTurn = ofRank[0].flatMap((_: number[], k: number) => ofRank.flatMap((batches: number[][]) => batches[k] ?? []));
  expect(await rowsOf(page, "Mini-batches", 30)).toEqual(inTurn.slice(0, 30));
  const chunks = plan.parts[0].chunks.flatMap((chunk: { obs_joinids: number[] }) => chunk.obs_joinids);
  expect(await rowsOf(page, "Shuffle chunks", 10)).toEqual(chunks.slice(0, 10));
  await expect(page.getByLabel("Rows of your query")).toHaveValue(String(plan.n_rows));
  await page.getByRole("button", { name: "Close the plan" }).click();
  await expect(page.getByRole("region", { name: "Query rows" })).toContainText("64 rows in 8 tiles");
});

test("a plan can be opened without dragging", async ({ page }) => {
  await open(page, SMALL);
  const chooser = page.waitForEvent("filechooser");
  await page.getByRole("button", { name: "Open a plan…" }).click();
  await (await chooser).setFiles(PLAN);
  await expect(page.getByRole("status").first()).toContainText("Drawn as it is");
});

test("a broken plan is told, and loses nothing", async ({ page }) => {
  await open(page, SMALL);
  const before = await picture(page);
  for (const [text, message] of [
    ["{", "plan.json cannot be drawn: the file is not JSON"],
    ["{}", "“format” must be \"tiledbsoma-ml plan\""],
    [readFileSync(PLAN, "utf8").replace(/"n_rows": \d+/, '"n_rows": -1'), "“n_rows” must be a whole number of at least 1, not -1"],
  ]) {
    await drop(page, text);
    await expect(page.getByRole("alert")).toContainText(message);
    expect(await picture(page)).toBe(before);
  }
  await drop(page, readFileSync(PLAN, "utf8"));
  await expect(page.getByRole("alert")).toHaveCount(0);
  const drawn = await picture(page);
  await drop(page, "{");
  await expect(page.getByRole("alert")).toBeVisible();
  expect(await picture(page)).toBe(drawn);
});

// Everybody -----------------------------------------------------------------------------------------------

// The width decides what lies where, and the theme its colours.
for (const [width, colorScheme] of [[360, "light"], [1280, "dark"], [3840, "light"]] as const) {
  test(`it fits ${width} pixels, ${colorScheme}, and axe finds nothing`, async ({ page }) => {
    await page.setViewportSize({ width, height: width === 3840 ? 2160 : 800 });
    await page.emulateMedia({ colorScheme });
    await open(page, `${SMALL}&ranks=2&workers=2&rows=65&row=3&at=2`);
    await page.getByRole("textbox", { name: "Chunk" }).fill("5");
    await page.getByText("The curves as a table").click();
    const { violations } = await new AxeBuilder({ page }).analyze();
    expect(violations.map(({ id, nodes }) => [id, nodes.map((node) => node.html)])).toEqual([]);
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(width);
    await open(page, "#at=3");
    await page.reload();
    await expect(page.locator("html")).toHaveAttribute("data-theme", colorScheme);
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(width);
  });
}

test("the theme can be chosen", async ({ page }) => {
  await open(page, SMALL);
  const light = await picture(page);
  await page.getByRole("button", { name: "Next mini-batch" }).click();
  const paler = await picture(page);
  await page.getByRole("button", { name: "Dark" }).click();
  await expect(page.locator("html")).toHaveAttribute("data-theme", "dark");
  await expect.poll(() => picture(page)).not.toBe(paler);
  expect(paler).not.toBe(light);
});

test("the file is self-contained", () => {
  const folder = fileURLToPath(new URL("../../dist/", import.meta.url));
  const html = readFileSync(`${folder}index.html`, "utf8");
  for (const [, url] of html.matchAll(/(?:src|href)="([^"]+)"/g)) expect(url).toMatch(/^(\.\/|data:)/);
});
