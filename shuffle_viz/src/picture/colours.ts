/** Colours of rows, as 32-bit pixels of a canvas. */

import type { Colour } from "../settings";

export type Theme = "light" | "dark";

const BACKGROUND: Record<Theme, readonly [number, number, number]> = {
  light: [255, 255, 255],
  dark: [22, 27, 34],
};

/** How much of its colour a row keeps: one that is neither read nor yielded now, one that waits, one of now. */
const KEPT = [0.16, 0.5, 1];

/** Pixels for each colour number at each level. */
export interface Palette {
  pixels: Uint32Array[];
  /** Whether text on a colour must be dark. */
  isLight: boolean[];
  of: (row: number) => number;
}

/** Return the palette for rows that are coloured by their position in the query, their tile or their label. */
export function paletteOf(colour: Colour, nRows: number, tiles: Int32Array, labels: Int32Array, theme: Theme): Palette {
  const isPosition = colour === "position";
  const colours = isPosition ? GRADIENT : CATEGORIES;
  const values = colour === "tile" ? tiles : labels;
  return {
    pixels: KEPT.map((kept) => Uint32Array.from(colours, (rgb) => pixel(rgb, kept, theme))),
    isLight: colours.map(([r, g, b]) => 0.3 * r + 0.6 * g + 0.1 * b > 130),
    of: isPosition
      ? (row) => Math.floor((row * GRADIENT.length) / Math.max(1, nRows))
      : (row) => values[row] % CATEGORIES.length,
  };
}

/** Return the gradient as CSS, for the legend. */
export function gradientCss(): string {
  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255].map((k) => `rgb(${GRADIENT[k].join(" ")})`);
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

type RGB = [number, number, number];

// Lightness grows all the way, so that the order is seen without the hue.
const GRADIENT: RGB[] = Array.from({ length: 256 }, (_, k) => {
  const t = k / 255;
  return oklch(0.4 + 0.46 * t, 0.15, 300 - 210 * t);
});
const CATEGORIES: RGB[] = Array.from({ length: 233 }, (_, k) => oklch(0.5 + 0.1 * (k % 4), 0.13, (k * 137.5) % 360));

function pixel(rgb: RGB, kept: number, theme: Theme): number {
  const [r, g, b] = rgb.map((value, i) => Math.round(value * kept + BACKGROUND[theme][i] * (1 - kept)));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

/** OKLCH (Ottosson) to sRGB, from 0 to 255. */
function oklch(lightness: number, chroma: number, hue: number): RGB {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const clipped = Math.max(0, Math.min(1, value));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  }) as RGB;
}
