import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { readPlan } from "../src/planFile";

const specification = readFileSync(new URL("../../docs/plan_format.md", import.meta.url), "utf8");
const EXAMPLE = JSON.parse(/```json\n(.*?)```/s.exec(specification)![1]);

test("the example of the specification is read as it is", () => {
  const plan = readPlan(JSON.stringify(EXAMPLE), "plan.json");
  expect([...plan.epoch.joinids]).toEqual([0, 1, 2, 3]);
  expect([...plan.epoch.steps.chunks.rows]).toEqual([2, 3, 0, 1]);
  expect([...plan.epoch.steps.ioBatches.rows]).toEqual([1, 3, 0, 2]);
  expect([...plan.epoch.steps.miniBatches.rows]).toEqual([1, 3, 0, 2]);
  expect([...plan.epoch.steps.miniBatches.starts]).toEqual([0, 2, 4]);
  expect([plan.nRows, plan.chunk, plan.ioBatch, plan.miniBatch, plan.isWhole]).toEqual([8, 2, 4, 2, true]);
});

test("joinids that are far apart keep their names and lie in their tiles", () => {
  const text = JSON.stringify(EXAMPLE).replace(/\b3\b(?=[,\]])/g, "9000000000");
  const { epoch } = readPlan(text, "plan.json");
  expect([...epoch.joinids]).toEqual([0, 1, 2, 9_000_000_000]);
  expect([...epoch.steps.query.starts]).toEqual([0, 3, 4]);
});

const part = EXAMPLE.parts[0];
test.each([
  ["no JSON", "{", "the file is not JSON"],
  ["another thing", "[]", "“the file” must be an object"],
  ["another format", JSON.stringify({ ...EXAMPLE, format: "x" }), "“format” must be"],
  ["a later version", JSON.stringify({ ...EXAMPLE, format_version: 2 }), "“format_version” must be 1, not 2"],
  ["no parts", JSON.stringify({ ...EXAMPLE, parts: undefined }), "“parts” must be a list"],
  ["no rows", JSON.stringify({ ...EXAMPLE, parts: [] }), "must list at least one row"],
  ["a tile of nothing", JSON.stringify({ ...EXAMPLE, row_tile: 0 }), "“row_tile” must be a whole number of at least 1, not 0"],
  ["a joinid that is none", JSON.stringify({ ...EXAMPLE, parts: [{ ...part, mini_batches: [[1, "x"]] }] }), "“parts[0].mini_batches[0][1]” must be a whole number"],
  ["a chunk with other rows", JSON.stringify({ ...EXAMPLE, parts: [{ ...part, mini_batches: [[1, 3]] }] }), "in no mini-batch"],
  ["an unknown scope", JSON.stringify({ ...EXAMPLE, settings: { ...EXAMPLE.settings, shuffle_scope: "all" } }), "“settings.shuffle_scope” must be"],
])("a plan with %s is refused with a sentence", (_, text, message) => {
  expect(() => readPlan(text, "plan.json")).toThrow(message);
});

test("more rows than can be drawn are refused", () => {
  const many = Array.from({ length: 200_001 }, (_, k) => k);
  const parts = [{ ...part, chunks: [], io_batches: [], mini_batches: [many] }];
  expect(() => readPlan(JSON.stringify({ ...EXAMPLE, parts }), "plan.json")).toThrow("--limit 200000");
});
