"use strict";

// State: what a reviewer has done. `verdicts` are those of the first pairs, in the page's order;
// `drafts` holds ratings and comment by pair, so that undoing a verdict loses neither.

function newState(reviewer) {
  return { reviewer, verdicts: [], drafts: {} };
}

function current(comparison, state) {
  return comparison.pairs[state.verdicts.length] || null;
}

function draft(state, pair) {
  return state.drafts[pair.id] || { left: {}, right: {}, comment: "" };
}

function decide(comparison, state, choice) {
  const pair = current(comparison, state);
  if (!pair) return state;
  const { left, right, comment } = draft(state, pair);
  // The seal is over this text: the order of the keys matters.
  const inOrder = (given) =>
    Object.fromEntries(comparison.criteria.filter((name) => given[name]).map((name) => [name, given[name]]));
  const verdict = { pair: pair.id, choice, left: inOrder(left), right: inOrder(right), comment: comment.trim() };
  return { ...state, verdicts: [...state.verdicts, verdict] };
}

function undo(state) {
  return { ...state, verdicts: state.verdicts.slice(0, -1) };
}

function rate(comparison, state, side, criterion, value) {
  const pair = current(comparison, state);
  if (!pair || !(value >= 0 && value <= comparison.best)) return state;
  const now = draft(state, pair);
  return withDraft(state, pair, { ...now, [side]: { ...now[side], [criterion]: value } });
}

function comment(comparison, state, text) {
  const pair = current(comparison, state);
  return pair ? withDraft(state, pair, { ...draft(state, pair), comment: text }) : state;
}

function withDraft(state, pair, changed) {
  return { ...state, drafts: { ...state.drafts, [pair.id]: changed } };
}

// What a browser kept is taken only when it fits this page.
function restored(comparison, text) {
  try {
    const state = JSON.parse(text);
    const fits =
      /^[0-9a-f]{16}$/.test(state.reviewer) &&
      state.verdicts.every((verdict, place) => comparison.pairs[place].id === verdict.pair) &&
      typeof state.drafts === "object" && state.drafts !== null;
    return fits ? state : null;
  } catch {
    return null;
  }
}

function verdictFile(comparison, state) {
  // A half of a surrogate pair has no UTF-8: the download would differ from what was sealed.
  const { reviewer } = state;
  const verdicts = state.verdicts.map((verdict) => ({ ...verdict, comment: wellFormed(verdict.comment) }));
  const seal = sha256([comparison.token, reviewer, JSON.stringify(verdicts)].join("\n"));
  return JSON.stringify({ format: comparison.format, comparison: comparison.id, reviewer, verdicts, seal }, null, 1);
}

function wellFormed(text) {
  return new TextDecoder().decode(new TextEncoder().encode(text));
}

// crypto.subtle is missing where a page from a file counts as insecure. FIPS 180-4.
function sha256(text) {
  const bytes = new TextEncoder().encode(text);
  const length = bytes.length;
  const padded = new Uint8Array((((length + 8) >> 6) + 1) << 6);
  padded.set(bytes);
  padded[length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 8, Math.floor(length / 0x20000000));
  view.setUint32(padded.length - 4, length << 3);
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((prime) => n % prime)) primes.push(n);
  const fraction = (root) => ((root - Math.floor(root)) * 0x100000000) | 0;
  const constants = primes.map((prime) => fraction(Math.cbrt(prime)));
  const hash = primes.slice(0, 8).map((prime) => fraction(Math.sqrt(prime)));
  const turn = (word, by) => (word >>> by) | (word << (32 - by));
  const words = new Int32Array(64);
  for (let start = 0; start < padded.length; start += 64) {
    for (let i = 0; i < 64; i++) {
      if (i < 16) {
        words[i] = view.getInt32(start + 4 * i);
        continue;
      }
      const x = words[i - 15], y = words[i - 2];
      const small0 = turn(x, 7) ^ turn(x, 18) ^ (x >>> 3);
      const small1 = turn(y, 17) ^ turn(y, 19) ^ (y >>> 10);
      words[i] = words[i - 16] + small0 + words[i - 7] + small1;
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 64; i++) {
      const big1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
      const first = (h + big1 + ((e & f) ^ (~e & g)) + constants[i] + words[i]) | 0;
      const big0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
      const second = (big0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) | 0, c, b, a, (first + second) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => (hash[i] = (hash[i] + word) | 0));
  }
  return hash.map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
}

// The page.

function start() {
  const comparison = JSON.parse(document.getElementById("comparison").textContent);
  const find = (id) => document.getElementById(id);
  const place = "tunesmith " + comparison.id;
  const rows = ["left", "right"].flatMap((side) => comparison.criteria.map((name) => ({ side, name })));
  let kept = true;
  let saved = 0; // verdicts that were downloaded
  let active = 0; // the row of ratings that 1 to 5 go to
  let state = load() || newState(randomId());

  function load() {
    try {
      return restored(comparison, localStorage.getItem(place));
    } catch {
      return null;
    }
  }

  function keep() {
    try {
      localStorage.setItem(place, JSON.stringify(state));
    } catch {
      kept = false; // private windows, blocked storage
    }
  }

  function randomId() {
    return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  function change(next, moved) {
    state = next;
    if (moved) {
      active = 0;
      find("told").textContent = "";
    }
    keep();
    show();
    if (moved) {
      find(current(comparison, state) ? "prompt-heading" : "done-heading").focus();
      window.scrollTo(0, 0);
    }
  }

  function show() {
    const done = state.verdicts.length, all = comparison.pairs.length;
    const pair = current(comparison, state);
    find("progress").value = done;
    find("count").textContent = done + " of " + all + " decided";
    find("not-kept").hidden = kept;
    find("pair").hidden = !pair;
    find("done").hidden = Boolean(pair);
    find("undo").disabled = done === 0;
    find("download").disabled = done === 0;
    if (pair) showPair(pair, done);
    else find("file").value = verdictFile(comparison, state);
  }

  function showPair(pair, done) {
    find("prompt-heading").textContent = "Prompt " + (done + 1);
    find("prompt").textContent = pair.prompt;
    find("reference").textContent = pair.reference;
    find("reference-box").hidden = !pair.reference;
    for (const side of ["left", "right"]) {
      const box = find(side + "-answer");
      box.textContent = pair[side] || "(an empty answer)";
      box.classList.toggle("empty", !pair[side]);
    }
    const now = draft(state, pair);
    if (find("comment").value !== now.comment) find("comment").value = now.comment;
    rows.forEach(({ side, name }, number) => {
      const row = find("rate-" + side + "-" + name);
      row.classList.toggle("active", number === active && find("ratings").open);
      row.querySelectorAll("button").forEach((button) => {
        button.setAttribute("aria-pressed", String(Number(button.textContent) === now[side][name]));
      });
    });
  }

  function press(number, value, clicked) {
    const { side, name } = rows[number];
    const pair = current(comparison, state);
    const same = clicked && draft(state, pair)[side][name] === value;
    active = same ? number : Math.min(number + 1, rows.length - 1);
    find("ratings").open = true;
    find("told").textContent = name + " of the " + side + " answer: " + (same ? "no rating" : value);
    change(rate(comparison, state, side, name, same ? 0 : value), false);
  }

  function download() {
    const text = verdictFile(comparison, state);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "verdicts-" + comparison.id + "-" + state.reviewer.slice(0, 6) + ".json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    saved = state.verdicts.length;
    find("told").textContent = link.download + " is downloaded.";
  }

  const keys = {
    ArrowLeft: () => change(decide(comparison, state, "left"), true),
    ArrowRight: () => change(decide(comparison, state, "right"), true),
    ArrowDown: () => change(decide(comparison, state, "tie"), true),
    u: () => change(undo(state), true),
    d: () => state.verdicts.length && download(),
    r: () => find("ratings").toggleAttribute("open"),
    f: () => find("reference-box").toggleAttribute("open"),
    c: () => {
      find("ratings").open = true;
      find("comment").focus();
    },
  };
  for (let value = 1; value <= comparison.best; value++) {
    keys[String(value)] = () => current(comparison, state) && press(active, value, false);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target instanceof HTMLTextAreaElement) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    if (!event.repeat) act(); // a key held down is one verdict, not twenty
  });
  for (const [id, key] of [["choose-left", "ArrowLeft"], ["choose-right", "ArrowRight"], ["choose-tie", "ArrowDown"]]) {
    find(id).addEventListener("click", keys[key]);
  }
  find("undo").addEventListener("click", keys.u);
  find("download").addEventListener("click", download);
  find("done-download").addEventListener("click", download);
  find("comment").addEventListener("input", (event) => change(comment(comparison, state, event.target.value), false));
  find("ratings").addEventListener("toggle", show);
  rows.forEach(({ side, name }, number) => {
    const row = find("rate-" + side + "-" + name);
    row.querySelectorAll("button").forEach((button) => {
      button.addEventListener("click", () => press(number, Number(button.textContent), true));
    });
    row.addEventListener("focusin", () => {
      active = number;
      show();
    });
  });
  window.addEventListener("beforeunload", (event) => {
    if (!kept && state.verdicts.length > saved) event.preventDefault();
  });
  keep();
  show();
}

if (typeof document !== "undefined") start();
else module.exports = { newState, current, decide, undo, rate, comment, restored, verdictFile, sha256 };
