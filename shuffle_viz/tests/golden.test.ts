import { createHash } from "node:crypto";
import { describe, expect, test } from "vitest";
import vectors from "../src/golden/vectors.json";
import { NOBODY, orderOf, type Scope, type Step } from "../src/order/epoch";
import { Generator } from "../src/order/random";
import { predictedMixing, type Sharing } from "../src/order/mixing";
import { chooseSizes, readSize } from "../src/order/tradeoff";
import { windowBytes } from "../src/predict";

function sha256(...arrays: Int32Array[]): string {
  const hash = createHash("sha256");
  for (const array of arrays) hash.update(Buffer.from(array.buffer, array.byteOffset, array.byteLength));
  return hash.digest("hex");
}

/** Sizes of the groups of a step, and their rows, but for what nobody reads. */
function digest(step: Step): string {
  const sizes: number[] = [];
  step.rank.forEach((rank, group) => {
    if (rank !== NOBODY) sizes.push(step.starts[group + 1] - step.starts[group]);
  });
  const nRows = sizes.reduce((sum, size) => sum + size, 0);
  return sha256(Int32Array.from(sizes), step.rows.subarray(0, nRows));
}

describe("what the page computes is what Python computes", () => {
  test.each(vectors.permutations)("permutations of the generator of $entropy", ({ entropy, sizes, sha256: expected }) => {
    const generator = new Generator(entropy.map(BigInt));
    expect(sha256(...sizes.map((size) => generator.permutation(size)))).toBe(expected);
  });

  test.each(vectors.orders)("order of an epoch: $setup", ({ setup, ioBatches, miniBatches, ...small }) => {
    const { steps } = orderOf({ ...setup, scope: setup.scope as Scope, seed: BigInt(setup.seed), tile: 4 });
    expect(digest(steps.ioBatches)).toBe(ioBatches);
    expect(digest(steps.miniBatches)).toBe(miniBatches);
    if ("rows" in small) {
      const { rows, starts, rank } = steps.miniBatches;
      const drawn = [...rank].flatMap((r, k) => (r === NOBODY ? [] : [[...rows.subarray(starts[k], starts[k + 1])]]));
      expect(drawn).toEqual(small.rows);
    }
  });

  test("predicted mixing", () => {
    for (const { sharing, chunk, window, endsWithChunk, mixing } of vectors.mixing) {
      expect(predictedMixing(sharing as Sharing, chunk, window, endsWithChunk)).toBeCloseTo(mixing, 7);
    }
  });

  test("read amplification", () => {
    for (const [chunk, window, tile, rows, held, ranks, expected] of vectors.amplification) {
      const ofReader = Math.floor(rows / ranks);
      expect(readSize({ chunk, window, tile, rows, ofReader, held }).amplification).toBeCloseTo(expected, 9);
    }
  });

  test("memory that a budget leaves for a window", () => {
    for (const [total, expected] of vectors.windowBytes) expect(windowBytes(total)).toBe(expected);
  });

  test('what "auto" stands for', () => {
    for (const { sharing, tile, windowRows, chunk, window, mixing } of vectors.sizes) {
      const sizes = chooseSizes(sharing as Sharing, tile, windowRows);
      expect([sizes.chunk, sizes.window]).toEqual([chunk, window]);
      expect(sizes.mixing).toBeCloseTo(mixing, 3); // Python samples the rows of large queries
    }
  });
});
