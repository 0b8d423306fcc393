// Asks for this page again and takes over what has changed: what it says is written in one place, the node.
"use strict";
const EVERY_MS = 2000, WAIT_MS_MAX = 5000;
const silent = document.getElementById("silent");
let answered = new Date(), timer;

function show(fresh) {
  for (const now of fresh.querySelectorAll("[data-live]")) {
    const shown = document.getElementById(now.id);
    if (shown.innerHTML !== now.innerHTML) shown.replaceChildren(...now.childNodes);
    if (shown.className !== now.className) shown.className = now.className;
  }
  document.title = fresh.title;
  document.getElementById("icon").href = fresh.getElementById("icon").href;
}

function say(isSilent) {
  document.body.classList.toggle("stale", isSilent);
  silent.querySelector("time").textContent = answered.toLocaleTimeString();
  silent.hidden = !isSilent;
}

async function refresh() {
  clearTimeout(timer);
  try {
    const answer = await fetch("/", { cache: "no-store", signal: AbortSignal.timeout(WAIT_MS_MAX) });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!fresh.getElementById("state")) throw new Error("something else answers");
    show(fresh);
    answered = new Date();
    say(false);
  } catch {
    document.title = "No answer · gradestore";
    say(true);
  }
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

timer = setTimeout(refresh, EVERY_MS);
// A page that nobody looks at asks for nothing.
document.addEventListener("visibilitychange", () => document.hidden ? clearTimeout(timer) : refresh());
