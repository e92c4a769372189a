import { useEffect, useState } from "react";
import type { Theme } from "../picture/colours";

/** The theme of the page: that of the system, until another one is chosen. */
export function useTheme(): [Theme, (theme: Theme) => void] {
  const [ofSystem, setOfSystem] = useState<Theme>(() => systemTheme());
  const [chosen, setChosen] = useState<Theme | null>(null);
  useEffect(() => {
    const query = matchMedia("(prefers-color-scheme: dark)");
    const onChange = () => setOfSystem(systemTheme());
    query.addEventListener("change", onChange);
    return () => query.removeEventListener("change", onChange);
  }, []);
  const theme = chosen ?? ofSystem;
  useEffect(() => {
    document.documentElement.dataset["theme"] = theme;
  }, [theme]);
  return [theme, setChosen];
}

function systemTheme(): Theme {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}
