// Before anything is drawn: the theme that was chosen here before.
try {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  /* Storage is switched off: the system's theme it is. */
}
