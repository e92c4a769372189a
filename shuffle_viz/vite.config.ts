import react from "@vitejs/plugin-react";
import { defineConfig, type Plugin } from "vite";

/** Browsers refuse modules and `crossorigin` from file://: one classic script instead, run after the page. */
function opensFromFile(): Plugin {
  return {
    name: "opens-from-file",
    enforce: "post",
    apply: "build",
    transformIndexHtml: (html) =>
      html.replace(/<script type="module" crossorigin/g, "<script defer").replace(/ crossorigin/g, ""),
  };
}

export default defineConfig({
  base: "./",
  plugins: [react(), opensFromFile()],
  build: {
    modulePreload: false,
    rollupOptions: { output: { format: "iife" } },
  },
  // A busy machine is slow, which is no fault of the page.
  test: { include: ["tests/*.test.ts"], testTimeout: 120_000 },
} as Parameters<typeof defineConfig>[0]);
