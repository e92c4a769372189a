import { describe, expect, test } from "vitest";
import { CENSUS, conflicts, fromAddress, parseField, PRESETS, toAddress } from "../src/settings";

test.each(Object.entries(PRESETS))("the preset %s keeps its own rules and survives the address", (_, { settings }) => {
  expect(conflicts(settings)).toEqual({});
  expect(fromAddress(toAddress(settings, 7, 3))).toEqual({ settings, at: 7, row: 3, problems: [] });
});

test("an empty address is the Census-like example", () => {
  expect(fromAddress("")).toEqual({ settings: CENSUS, at: 0, row: null, problems: [] });
});

test("a seed of 128 bits survives the address", () => {
  const settings = { ...CENSUS, seed: 2n ** 128n - 1n };
  expect(fromAddress(toAddress(settings, 0, null)).settings.seed).toBe(2n ** 128n - 1n);
});

test("what is broken in an address is told, and the rest is taken", () => {
  const { settings, problems } = fromAddress("#rows=64&chunk=0&scope=all&seed=-1&miniBatch=16&row=64&at=-2&unknown=1");
  expect(settings).toEqual({ ...CENSUS, rows: 64, miniBatch: 16 });
  expect(problems).toEqual([
    "Chunk must be a whole number from 1 to 100,000, not “0”; try 64.",
    "scope must be one of partition, global, not “all”.",
    "Seed must be a whole number from 0 to 2^128 - 1, not “-1”; try 0.",
  ]);
});

test("an IO batch that is no multiple of the chunk is told and mended in an address", () => {
  const { settings, problems } = fromAddress("#chunk=64&ioBatch=100");
  expect(settings.ioBatch).toBe(128);
  expect(problems).toEqual(["IO batch 100 must be a multiple of the chunk, 64; try 128."]);
});

describe("fields", () => {
  test.each(["0", "-3", "1.5", "abc", "", "100001", "1e99", "Infinity", "0x10"])("refuse “%s” as a number of rows", (text) => {
    expect(parseField("rows", text).error).toBe(`Rows must be a whole number from 1 to 100,000, not “${text}”; try 1,000.`);
  });
  test.each([
    ["1", 1],
    [" 65,536 ", 65_536],
    ["100_000", 100_000],
    ["1e3", 1000],
  ])("take “%s” as a number of rows", (text, value) => {
    expect(parseField("rows", text).value).toBe(value);
  });
  test("of decimals take decimals", () => {
    expect(parseField("scanNs", "16.5").value).toBe(16.5);
  });
});
