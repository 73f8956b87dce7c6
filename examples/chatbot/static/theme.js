// Applies the stored theme. The page loads this before its styles are drawn, to avoid a flash.
try {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage is disabled: the system's theme applies.
}
