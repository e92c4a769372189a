/**
 * NumPy's random numbers: `np.random.default_rng(entropy).permutation(n)`, to the last one.
 *
 * SeedSequence (O'Neill's seed_seq, as NumPy varies it), PCG64 (PCG XSL RR 128/64) and the Fisher-Yates shuffle
 * with masked rejection of `Generator.shuffle`. 128-bit numbers are four 32-bit limbs, lowest first: BigInt
 * would take ten times as long.
 */

/** The generator that `np.random.default_rng([...entropy])` returns, as far as permutations need it. */
export class Generator {
  private readonly state: Uint32Array;
  private readonly increment: Uint32Array;
  private readonly mixed = new Uint32Array(4);
  /** The upper half of the last 64 bits, if only the lower one was used. */
  private waiting = -1;

  constructor(entropy: readonly bigint[]) {
    const seeds = new SeedSequence(entropy).generate(8);
    // PCG64 takes (high, low) pairs of 64-bit words; each word is two of these, low half first.
    const initial = [seeds[2], seeds[3], seeds[0], seeds[1]];
    const stream = [seeds[6], seeds[7], seeds[4], seeds[5]];
    this.state = new Uint32Array(4);
    this.increment = new Uint32Array(
      stream.map((limb, i) => (limb << 1) | (i === 0 ? 1 : stream[i - 1] >>> 31)),
    );
    this.step();
    add(this.state, initial);
    this.step();
  }

  /** Return the numbers 0 … n - 1 in random order, as `permutation(n)` does. */
  permutation(n: number): Int32Array {
    const order = new Int32Array(n);
    for (let i = 0; i < n; i++) order[i] = i;
    this.shuffle(order);
    return order;
  }

  /** Put `items` into random order, in place. */
  shuffle(items: Int32Array): void {
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.upTo(i);
      const item = items[i];
      items[i] = items[j];
      items[j] = item;
    }
  }

  /** Return a number from 0 to `max`, both included: masked rejection of 32 bits. */
  private upTo(max: number): number {
    const mask = 0xffffffff >>> Math.clz32(max);
    for (;;) {
      const value = (this.next32() & mask) >>> 0;
      if (value <= max) return value;
    }
  }

  private next32(): number {
    if (this.waiting >= 0) {
      const upper = this.waiting;
      this.waiting = -1;
      return upper;
    }
    this.step();
    const { state } = this;
    const low = (state[0] ^ state[2]) >>> 0;
    const high = (state[1] ^ state[3]) >>> 0;
    const turn = state[3] >>> 26;
    const from = turn < 32 ? low : high;
    const other = turn < 32 ? high : low;
    this.waiting = rotatedHalf(other, from, turn & 31);
    return rotatedHalf(from, other, turn & 31);
  }

  /** state = state * MULTIPLIER + increment, modulo 2 ** 128. */
  private step(): void {
    const { state, increment, mixed } = this;
    let carry = 0;
    for (let column = 0; column < 8; column++) {
      // Products of a 32-bit and a 16-bit limb have at most 48 bits: sums of all of them are exact.
      let sum = carry;
      for (let i = 0; 2 * i <= column; i++) sum += state[i] * MULTIPLIER[column - 2 * i];
      carry = Math.floor(sum / 65536);
      const digit = sum - carry * 65536;
      if (column % 2 === 0) mixed[column >> 1] = digit;
      else mixed[column >> 1] += digit * 65536;
    }
    carry = 0;
    for (let i = 0; i < 4; i++) {
      const sum = mixed[i] + increment[i] + carry;
      state[i] = sum;
      carry = sum > 0xffffffff ? 1 : 0;
    }
  }
}

/** 0x2360ED051FC65DA44385DF649FCCF645 in 16-bit limbs, lowest first. */
const MULTIPLIER = Uint16Array.of(0xf645, 0x9fcc, 0xdf64, 0x4385, 0x5da4, 0x1fc6, 0xed05, 0x2360);

/** The lower 32 bits of the 64-bit number (upper, lower), rotated right by `shift` < 32. */
function rotatedHalf(lower: number, upper: number, shift: number): number {
  return shift === 0 ? lower : ((lower >>> shift) | (upper << (32 - shift))) >>> 0;
}

function add(limbs: Uint32Array, others: ArrayLike<number>): void {
  let carry = 0;
  for (let i = 0; i < 4; i++) {
    const sum = limbs[i] + others[i] + carry;
    limbs[i] = sum;
    carry = sum > 0xffffffff ? 1 : 0;
  }
}

/** NumPy's SeedSequence without a spawn key. */
class SeedSequence {
  private readonly pool = new Uint32Array(4);

  constructor(entropy: readonly bigint[]) {
    const words = entropy.flatMap(words32);
    const hash = hasher(0x43b0d7e5, 0x931e8875);
    for (let i = 0; i < 4; i++) this.pool[i] = hash(words[i] ?? 0);
    for (let from = 0; from < 4; from++) {
      for (let to = 0; to < 4; to++) if (from !== to) this.mixIn(to, hash(this.pool[from]));
    }
    for (const word of words.slice(4)) for (let to = 0; to < 4; to++) this.mixIn(to, hash(word));
  }

  generate(nWords: number): Uint32Array {
    const hash = hasher(0x8b51f9dd, 0x58f38ded);
    return Uint32Array.from({ length: nWords }, (_, i) => hash(this.pool[i % 4]));
  }

  private mixIn(to: number, hashed: number): void {
    const value = (Math.imul(0xca01f9dd, this.pool[to]) - Math.imul(0x4973f715, hashed)) >>> 0;
    this.pool[to] = value ^ (value >>> 16);
  }
}

function hasher(initial: number, multiplier: number): (value: number) => number {
  let constant = initial;
  return (value) => {
    const mixed = value ^ constant;
    constant = Math.imul(constant, multiplier) >>> 0;
    const hashed = Math.imul(mixed, constant) >>> 0;
    return (hashed ^ (hashed >>> 16)) >>> 0;
  };
}

/** Return a number as 32-bit words, lowest first; zero is one word. */
function words32(value: bigint): number[] {
  const words: number[] = [];
  do {
    words.push(Number(value & 0xffffffffn));
    value >>= 32n;
  } while (value > 0n);
  return words;
}
