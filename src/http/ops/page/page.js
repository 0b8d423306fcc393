// Fetches this page again, at the path under which it was loaded, and replaces the parts that changed. The node renders all content.
"use strict";
const EVERY_MS = 2000, WAIT_MS_MAX = 5000;
const silent = document.getElementById("silent");
let lastResponse = new Date(), timer;

function update(fresh) {
  for (const next of fresh.querySelectorAll("[data-live]")) {
    const current = document.getElementById(next.id);
    if (current.innerHTML !== next.innerHTML) current.replaceChildren(...next.childNodes);
    if (current.className !== next.className) current.className = next.className;
  }
  document.title = fresh.title;
  document.getElementById("icon").href = fresh.getElementById("icon").href;
}

function setSilent(isSilent) {
  document.body.classList.toggle("stale", isSilent);
  silent.querySelector("time").textContent = lastResponse.toISOString().slice(0, 19).replace("T", " ") + " UTC";
  silent.hidden = !isSilent;
}

async function refresh() {
  clearTimeout(timer);
  try {
    const response = await fetch("", { cache: "no-store", signal: AbortSignal.timeout(WAIT_MS_MAX) });
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!fresh.getElementById("state")) throw new Error("not a status page");
    update(fresh);
    lastResponse = new Date();
    setSilent(false);
  } catch {
    document.title = "No response · gradestore";
    setSilent(true);
  }
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

timer = setTimeout(refresh, EVERY_MS);
// A hidden page does not refresh.
document.addEventListener("visibilitychange", () => document.hidden ? clearTimeout(timer) : refresh());
