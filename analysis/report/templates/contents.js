// Folds the contents on a small screen and marks the section that is being read.
"use strict";
const narrow = window.matchMedia("(max-width: 78rem)").matches;
if (narrow) document.querySelector("details.contents").open = false;
const parts = new Map([...document.querySelectorAll("nav ol ol a")].map((link) =>
  [document.getElementById(decodeURIComponent(link.hash.slice(1))), link]));
parts.delete(null);
function mark() {
  let current = null;
  for (const part of parts.keys()) {
    if (part.getBoundingClientRect().top < window.innerHeight / 3) current = part;
  }
  for (const [part, link] of parts) {
    if (part === current) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}
let waiting = false;
window.addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; mark(); });
}, {passive: true});
mark();
// A link may lead into a folded part: unfold it.
function unfold() {
  const target = document.querySelector(":target");
  for (let part = target; part; part = part.parentElement) {
    if (part.localName === "details") part.open = true;
  }
  if (target) target.scrollIntoView();
}
window.addEventListener("hashchange", unfold);
if (location.hash) unfold();
