/** Numbers as text. */

export function whole(value: number): string {
  return Math.round(value).toLocaleString("en");
}

/** A number with as many decimals as tell something. */
export function decimal(value: number): string {
  if (value >= 1000) return whole(value);
  return value.toLocaleString("en", { maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2 });
}

/** How many times, with one decimal where that tells something. */
export function times(value: number): string {
  return value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
}

/** A number of rows a second: two digits of it are predicted. */
export function rate(value: number): string {
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(value)) - 1);
  return whole(Math.round(value / unit) * unit);
}

export function percent(share: number): string {
  const value = 100 * share;
  return `${value.toLocaleString("en", { maximumFractionDigits: value < 99.5 && value >= 10 ? 0 : 1 })} %`;
}

export function plural(n: number, word: string): string {
  return `${whole(n)} ${word}${n === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`;
}

export function bytes(n: number): string {
  const [unit, name] = n >= 2 ** 30 ? [2 ** 30, "GiB"] : n >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
  return `${decimal(n / unit)} ${name}`;
}
