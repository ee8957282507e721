// What the console does beyond forms and links: live parts, keys, and small comforts. Every page works without it.
"use strict";

(() => {
  const root = document.documentElement;
  root.classList.add("script");

  // Live parts: an element with data-live names an address of server-sent events; each part has the id of an element.
  const beat = document.querySelector(".beat");
  const say = (state, text) => {
    if (!beat) return;
    beat.classList.toggle("on", state === "on");
    beat.classList.toggle("off", state === "off");
    if (beat.textContent !== text) beat.textContent = text;
  };
  const busy = (element) => {
    const active = document.activeElement;
    const typing = active && active.closest("form, details[open]") && element.contains(active);
    return typing || element.querySelector("details.verb[open]") !== null || String(document.getSelection()).length > 0;
  };
  const place = (id, html) => {
    const element = document.getElementById(id);
    if (!element || busy(element)) return;
    const open = [...element.querySelectorAll("details[open][id]")].map((each) => each.id);
    const scrolled = [...element.querySelectorAll(".scroll, pre")].map((each) => [each.scrollLeft, each.scrollTop]);
    element.innerHTML = html; // made by our own templates, which escape what others wrote
    open.forEach((each) => document.getElementById(each)?.setAttribute("open", ""));
    [...element.querySelectorAll(".scroll, pre")].forEach((each, n) => {
      if (scrolled[n]) [each.scrollLeft, each.scrollTop] = scrolled[n];
    });
  };
  const live = document.querySelector("[data-live]");
  if (live && window.EventSource) {
    let source = null;
    const open = () => {
      source = new EventSource(live.dataset.live);
      source.addEventListener("open", () => say("on", "live"));
      source.addEventListener("error", () => say("off", "reconnecting"));
      source.addEventListener("trouble", () => say("off", "not fresh"));
      source.addEventListener("parts", (event) => {
        say("on", "live");
        for (const [id, html] of Object.entries(JSON.parse(event.data))) place(id, html);
      });
      source.addEventListener("over", () => { source.close(); source = null; say("", "ended"); });
    };
    const close = () => { if (source) { source.close(); source = null; } };
    open();
    document.addEventListener("visibilitychange", () => (document.hidden ? close() : source || open()));
    window.addEventListener("pagehide", close);
    window.addEventListener("pageshow", (event) => { if (event.persisted && !source) open(); });
  }

  // Keys: g and a letter goes somewhere, j and k walk rows, / looks for something, ? helps.
  const help = document.getElementById("help");
  const rows = () => [...document.querySelectorAll("tbody tr[data-href]")];
  let waits = 0;
  const walk = (step) => {
    const all = rows();
    if (!all.length) return;
    const now = all.findIndex((row) => row.classList.contains("chosen"));
    const next = Math.max(0, Math.min(all.length - 1, now + step));
    all.forEach((row) => row.classList.remove("chosen"));
    all[next].classList.add("chosen");
    all[next].scrollIntoView({ block: "nearest" });
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const open = document.querySelector("details.verb[open]");
    if (event.key === "Escape" && open) {
      open.removeAttribute("open");
      open.querySelector("summary").focus();
      return;
    }
    if (event.target.closest("input, textarea, select, dialog")) return;
    if (Date.now() - waits < 1500) {
      waits = 0;
      const there = document.querySelector(`nav a[data-key="${CSS.escape(event.key)}"]`);
      if (there) { event.preventDefault(); there.click(); }
      return;
    }
    if (event.key === "g") waits = Date.now();
    else if (event.key === "?" && help) help.showModal();
    else if (event.key === "j") walk(1);
    else if (event.key === "k") walk(-1);
    else if (event.key === "Enter" && event.target === document.body) {
      const row = document.querySelector("tr.chosen");
      if (row) location.assign(row.dataset.href);
    } else if (event.key === "/") {
      const first = document.querySelector(".filters input");
      if (first) { event.preventDefault(); first.focus(); }
    } else if (event.key === "e") document.querySelector("a[data-act=edit]")?.click();
    else if (event.key === "r") document.querySelector("details[data-act=retry] > summary")?.click();
  });
  document.querySelectorAll("[data-help]").forEach((each) => each.addEventListener("click", () => help?.showModal()));

  // Comforts: a form that opens takes the cursor; one that is sent is not sent twice; others close.
  document.addEventListener("toggle", (event) => {
    if (!event.target.matches?.("details.verb") || !event.target.open) return;
    document.querySelectorAll("details.verb[open]").forEach((each) => { if (each !== event.target) each.open = false; });
    event.target.querySelector("input:not([type=hidden])")?.focus();
  }, true);
  document.addEventListener("click", (event) => {
    if (!event.target.closest("details.verb")) document.querySelectorAll("details.verb[open]").forEach((each) => { each.open = false; });
  });
  document.addEventListener("submit", (event) => {
    if (event.target.dataset.sent) { event.preventDefault(); return; }
    event.target.dataset.sent = "yes";
    setTimeout(() => delete event.target.dataset.sent, 4000);
  });
  document.addEventListener("change", (event) => { if (event.target.matches("[data-submits]")) event.target.form.requestSubmit(); });
})();
