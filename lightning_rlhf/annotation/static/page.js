// Keys, undo and progress for the page; without it the page is a plain form. A verdict is never lost: it is kept in the
// browser until the server has said that it has it.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  root.classList.add("scripted");
  const saved = (name, value) => {
    try {
      if (value === undefined) return localStorage.getItem(name) || "";
      if (value === "") localStorage.removeItem(name); else localStorage.setItem(name, value);
    } catch { /* a browser without storage forgets settings, no more */ }
    return value || "";
  };
  const look = () => {
    for (const name of ["theme", "layout"]) {
      if (saved(name)) root.dataset[name] = saved(name); else delete root.dataset[name];
    }
    root.classList.toggle("raw", saved("raw") === "1");
    root.classList.toggle("keys-off", saved("keys") === "off");
    if ($("raw")) $("raw").setAttribute("aria-pressed", String(saved("raw") === "1"));
  };
  look();

  // a sign-in link carries its code behind the #, which no log sees
  if (location.pathname === "/join" && location.hash.startsWith("#c=")) {
    const code = location.hash.slice(3);
    history.replaceState(null, "", "/join");
    $("token").value = code;
    $("join").submit();
    return;
  }
  // a link that is pasted while this page is open changes the part behind the # alone, and loads nothing
  if (location.pathname === "/join") addEventListener("hashchange", () => location.reload());
  const stage = $("stage");
  if (!stage) return;

  let shownAt = performance.now(), active = 0, lastTick = performance.now(), busy = false, sending = false, sleepTimer = 0;
  const status = (text, trouble = false) => {
    const box = $("status");
    box.textContent = text;
    box.classList.add("on");
    box.classList.toggle("trouble", trouble);
    clearTimeout(sleepTimer);
    if (!trouble) sleepTimer = setTimeout(() => box.classList.remove("on"), 1800);
  };
  // seconds count while somebody can see the pair
  setInterval(() => {
    const now = performance.now();
    if (document.visibilityState === "visible" && document.hasFocus()) active += Math.min(now - lastTick, 2000) / 1000;
    lastTick = now;
  }, 500);

  const call = async (path, body) => {
    const init = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const reply = await fetch(path, { credentials: "same-origin", ...init });
    if (reply.status === 401) { location.href = "/join"; throw new Error("signed out"); }
    return reply;
  };
  const counts = (progress) => {
    if (!progress || !$("bar")) return;
    $("bar").max = progress.total || 1;
    $("bar").value = progress.done;
    $("counts").textContent = `${progress.mine} by you, ${progress.left} to go`;
  };
  const flagCount = () => {
    const box = $("flag-count");
    if (box) box.textContent = stage.querySelectorAll("input[name=flags]:checked").length || "";
  };
  const show = (data) => {
    if (data.guidelines) { location.href = "/guidelines"; return; }
    stage.innerHTML = data.html; // made by the server, whose renderer lets no tag of a model through
    counts(data.progress);
    look();
    flagCount();
    const question = $("question");
    document.title = question.textContent;
    window.scrollTo(0, 0);
    question.focus({ preventScroll: true });
    shownAt = lastTick = performance.now();
    active = 0;
  };
  const pull = async (path) => {
    busy = true;
    try {
      const reply = await call(path);
      if (reply.ok) show(await reply.json()); else status("There is nothing further back.");
    } catch { status("The server does not answer; trying again.", true); setTimeout(() => pull(path), 2000); return; }
    finally { busy = false; }
  };

  // verdicts wait in the outbox until the server has them, also over a reload
  const outbox = () => { try { return JSON.parse(saved("outbox") || "[]"); } catch { return []; } };
  const send = async () => {
    if (sending) return;
    sending = true;
    try {
      while (outbox().length) {
        const [ballot] = outbox();
        let reply;
        try { reply = await call("/api/v1/votes", ballot); } catch {
          status("No answer from the server. Your verdict is kept here and sent again.", true);
          setTimeout(send, 2000);
          return;
        }
        if (reply.status >= 500 || reply.status === 429) { status("The server is busy. Your verdict is kept here and sent again.", true); setTimeout(send, 2000); return; }
        saved("outbox", JSON.stringify(outbox().slice(1)));
        const answer = await reply.json().catch(() => ({}));
        if (!reply.ok) status(answer.error || "The server refused this verdict.", true);
        else status(answer.kept === "late" ? "Too late to change the label; kept for the statistics." : "Kept.");
        if (!outbox().length) await pull("/api/v1/next" + (answer.feedback ? "?feedback=" + encodeURIComponent(ballot.uid) : ""));
      }
    } finally { sending = false; }
  };
  const vote = (value) => {
    const pair = $("pair-id");
    if (!pair || busy || sending) return;
    const match = /^(left|right)([123])?$/.exec(value);
    const ballot = {
      id: pair.value, uid: crypto.randomUUID ? crypto.randomUUID() : Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join(""),
      side: match ? match[1] : value, strength: match && match[2] ? Number(match[2]) : null, reason: value === "skip" ? $("reason").value : "",
      flags: Array.from(stage.querySelectorAll("input[name=flags]:checked"), (box) => box.value), rationale: $("rationale").value,
      seconds: Math.round(active * 10) / 10, rendered: saved("raw") === "1" ? "raw" : "markdown",
    };
    saved("outbox", JSON.stringify([...outbox(), ballot]));
    send();
  };
  stage.addEventListener("submit", (event) => { event.preventDefault(); if (event.submitter) vote(event.submitter.value); });
  stage.addEventListener("change", flagCount);
  stage.addEventListener("click", (event) => {
    const link = event.target.closest("[data-back]");
    if (link) { event.preventDefault(); back(Number(link.dataset.back)); }
    if (event.target.closest("#raw")) toggleRaw();
  });
  // one panel at a time, also where browsers do not know details with a name
  stage.addEventListener("toggle", (event) => {
    if (!event.target.open) return;
    for (const other of stage.querySelectorAll("details[open]")) if (other !== event.target) other.open = false;
  }, true);
  const back = (steps) => { if (!busy && !sending) pull(steps ? `/api/v1/last?back=${steps}` : "/api/v1/next"); };
  const toggleRaw = () => { saved("raw", saved("raw") === "1" ? "" : "1"); look(); };
  const openPanel = (id, focus) => {
    const panel = $(id);
    if (!panel) return;
    panel.open = !panel.open;
    if (panel.open) stage.querySelector(focus)?.focus();
  };
  const closePanels = () => { for (const panel of stage.querySelectorAll("details[open]")) panel.open = false; };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { closePanels(); if (document.activeElement?.matches("textarea, select")) document.activeElement.blur(); return; }
    if (saved("keys") === "off" || event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.repeat) return;
    if (event.target.closest("input, textarea, select, dialog") || performance.now() - shownAt < 300) return;
    // a French keyboard gives & for the key of 1
    const digit = /^[1-7]$/.test(event.key) ? event.key : /^(?:Digit|Numpad)([1-7])$/.exec(event.code)?.[1];
    const key = event.key.toLowerCase();
    let done = true;
    if (digit && $("pair")?.dataset.scale) {
      const values = $("pair").dataset.scale === "7" ? ["left3", "left2", "left1", "tie", "right1", "right2", "right3"] : ["left", "tie", "right"];
      if (values[digit - 1]) vote(values[digit - 1]);
    } else if (key === "b") vote("both_bad");
    else if (key === "s") openPanel("skip", "#reason");
    else if (key === "w") openPanel("why", "#rationale");
    else if (key === "f") openPanel("flags", "input[name=flags]");
    else if (key === "u") $("undo")?.click();
    else if (key === "m") toggleRaw();
    else if (key === "g") $("open-guidelines")?.click();
    else if (key === "?") $("help").showModal();
    else done = false;
    if (done) event.preventDefault();
  });

  $("open-help").addEventListener("click", () => $("help").showModal());
  $("keys-on").checked = saved("keys") !== "off";
  $("keys-on").addEventListener("change", (event) => { saved("keys", event.target.checked ? "" : "off"); look(); });
  for (const name of ["theme", "layout"]) {
    $(name).value = saved(name);
    $(name).addEventListener("change", (event) => { saved(name, event.target.value); look(); });
  }

  // the lease of the pair lasts while the page is open
  setInterval(() => {
    const pair = $("pair-id");
    if (pair && document.visibilityState === "visible") call("/api/v1/beat", { id: pair.value }).catch(() => {});
  }, 60000);
  setTimeout(() => status("You have worked for 45 minutes: take a break."), 45 * 60000);
  const events = new EventSource("/api/v1/events");
  events.addEventListener("progress", (event) => {
    const news = JSON.parse(event.data);
    counts(news);
    if (news.has_work && !$("pair-id") && !busy && !sending) pull("/api/v1/next");
  });
  flagCount();
  if (outbox().length) send();
})();
