/* A picture and a question go to the server that this page came from; the answer, what was kept of the picture, and
   where the time went come back. Text is put in as text only, never as HTML. */

import { Problem, answerEvents, modelFromServer } from "/page/server.js";

const KEY = "holov-export.api-key"; // in sessionStorage: gone with the tab
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // that the server reads
/* in the order of their happening; the first token comes after "prefill" */
const BEFORE_TOKEN = ["queue", "preprocess", "vision", "stitch", "setup", "prefill"];
const VEIL = "rgb(10 12 16 / .76)", HALF_VEIL = "rgb(10 12 16 / .38)", EDGE = "#f0a020";

const at = (id) => document.getElementById(id);
const model = { id: "", holov: null };
/* a turn is {question, pictures, answer}; a picture is {name, url, image, kept}; `pending` go with the next question */
const talk = { turns: [], current: null, pending: [], shown: null, stopper: null };

// ---- the server

const key = () => sessionStorage.getItem(KEY) ?? "";

async function loadModel() {
  const facts = at("facts");
  try {
    const entry = await modelFromServer(key());
    Object.assign(model, entry);
    facts.textContent = `${entry.id} · ${entry.holov.method} · ${entry.holov.engine}`;
    showBudgetRange();
    return true;
  } catch (error) {
    facts.textContent = wordsFromError(error);
    return false;
  } finally {
    facts.classList.toggle("bad", !model.id);
  }
}

function wordsFromError(error) {
  if (error.status === 401) {
    at("access").open = true;
    at("key").focus();
  }
  return error instanceof Problem ? error.message : `This page failed: ${error.message}`;
}

// ---- the conversation

function ask(event) {
  event?.preventDefault();
  const question = at("question").value.trim();
  if (talk.stopper || !question) return;
  if (!pictures().length) return showProblem("Add a picture first.");
  const turn = { question, pictures: talk.pending, answer: "" };
  talk.pending = [];
  at("question").value = "";
  addQuestion(turn);
  answerTurn(turn, "");
}

/* The last question once more, with the budget of now; the earlier answer stays in sight only. */
function askAgain() {
  if (talk.stopper || !talk.turns.length) return;
  const turn = talk.turns.pop();
  const earlier = turn.answer;
  turn.answer = "";
  answerTurn(turn, earlier);
}

async function answerTurn(turn, earlier) {
  const shown = addAnswer();
  talk.current = turn;
  talk.stopper = new AbortController();
  setAsking(true);
  let note = "";
  try {
    if (!model.id && !(await loadModel())) throw new Problem(at("facts").textContent);
    const budget = automatic() ? undefined : at("budget").valueAsNumber;
    const asked = { model: model.id, turns: [...talk.turns, turn], budget, key: key(), signal: talk.stopper.signal };
    for await (const chunk of answerEvents(asked)) {
      if (chunk.holov) note = takeFacts(chunk) ?? note;
      const piece = chunk.choices[0]?.delta?.content;
      if (piece) {
        turn.answer += piece;
        shown.text.append(piece);
        at("log").scrollTop = at("log").scrollHeight;
      }
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    note = stopped ? "stopped" : turn.answer ? "broken off" : "not answered";
    if (!stopped) showProblem(wordsFromError(error));
  }
  talk.stopper = talk.current = null;
  settle(turn, earlier);
  setAsking(false);
  shown.finish(note || "no words", talk.turns.at(-1) === turn && turn.answer !== "");
}

/* A turn without an answer is no part of the conversation: its pictures and words go back to where they were. */
function settle(turn, earlier) {
  turn.answer ||= earlier;
  if (turn.answer) return talk.turns.push(turn);
  talk.pending = [...turn.pictures, ...talk.pending];
  at("question").value ||= turn.question;
}

/* Draw what an event says beside the answer. Returns the line below the answer once everything is known. */
function takeFacts({ holov, usage }) {
  holov.kept?.forEach((kept, index) => { pictures()[index].kept = kept; });
  if (holov.kept) showPicture();
  showTimes(holov.timings_ms);
  showBudget(holov.budget);
  if (!usage) return null;
  const { ttft, total } = holov.timings_ms;
  const visual = holov.visual_tokens.join(" + "), made = counted(usage.completion_tokens, "token");
  const word = visual === "1" ? "token" : "tokens";
  return `${visual} visual ${word} · first token ${duration(ttft)} · ${made} in ${duration(total)}`;
}

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function addQuestion(turn) {
  at("silence").hidden = true;
  const said = element("div", "said question", turn.question);
  const count = turn.pictures.length;
  if (count) said.prepend(element("span", "with", `with ${counted(count, "picture")}`));
  at("log").append(said);
}

function addAnswer() {
  document.querySelectorAll("#log .again").forEach((place) => place.remove());
  const said = element("div", "said answer"), text = element("span", "text");
  said.setAttribute("aria-busy", "true"); // screen readers wait for the whole of it
  said.append(text);
  at("log").append(said);
  at("log").scrollTop = at("log").scrollHeight;
  return {
    text,
    finish(note, repeatable) {
      const meta = element("div", "meta", note);
      if (repeatable) {
        const again = element("button", "quiet", "Ask again"), place = element("span", "again", " · ");
        again.type = "button";
        again.title = "The same question, with the tokens chosen now";
        again.addEventListener("click", () => { said.classList.add("older"); askAgain(); });
        place.append(again);
        meta.append(place);
      }
      said.append(meta);
      said.setAttribute("aria-busy", "false");
      at("log").scrollTop = at("log").scrollHeight;
    },
  };
}

function setAsking(asking) {
  at("send").hidden = asking;
  at("stop").hidden = !asking;
  at("clear").disabled = asking;
  if (asking) showProblem("");
  showStrip();
}

function showProblem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

function startOver() {
  Object.assign(talk, { turns: [], pending: [], shown: null });
  document.querySelectorAll("#log .said").forEach((said) => said.remove());
  at("silence").hidden = false;
  showProblem("");
  showTimes({});
  showPicture();
}

// ---- pictures

function pictures() {
  const turns = talk.current ? [...talk.turns, talk.current] : talk.turns;
  return [...turns.flatMap((turn) => turn.pictures), ...talk.pending];
}

async function addFiles(files) {
  showProblem("");
  for (const file of files) {
    try {
      const url = await urlFromFile(file);
      const image = new Image();
      image.src = url;
      await image.decode();
      talk.shown = { name: file.name || "pasted picture", url, image, kept: null };
      talk.pending.push(talk.shown);
    } catch {
      showProblem(`'${file.name}' is no picture that can be shown (PNG, JPEG, WebP or GIF).`);
    }
  }
  showPicture();
}

function urlFromFile(file) {
  return new Promise((resolve, reject) => {
    if (!KINDS.includes(file.type)) return reject(new TypeError(file.type));
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function remove(picture) {
  talk.pending = talk.pending.filter((other) => other !== picture);
  if (talk.shown === picture) talk.shown = pictures().at(-1) ?? null;
  showPicture();
}

function showStrip() {
  const items = pictures().map((picture, index) => {
    const item = document.createElement("li"), thumb = element("button", "thumb"), small = new Image();
    thumb.type = "button";
    thumb.setAttribute("aria-pressed", String(picture === talk.shown));
    thumb.addEventListener("click", () => {
      talk.shown = picture;
      showPicture();
      at("strip").children[index].firstChild.focus();
    });
    small.src = picture.url;
    small.alt = `Show picture ${index + 1}: ${picture.name}`;
    thumb.append(small);
    item.append(thumb);
    if (talk.pending.includes(picture)) {
      const cross = element("button", "remove", "×");
      cross.type = "button";
      cross.setAttribute("aria-label", `Remove ${picture.name}`);
      cross.addEventListener("click", () => { remove(picture); at("files").focus(); });
      item.append(cross);
    }
    return item;
  });
  at("strip").replaceChildren(...items);
  at("strip").hidden = !items.length;
}

function showPicture() {
  const picture = talk.shown;
  at("stage").classList.toggle("empty", !picture);
  at("frame").hidden = !picture;
  at("invite").hidden = Boolean(picture);
  if (picture && at("picture").src !== picture.url) at("picture").src = picture.url;
  at("picture").alt = picture?.name ?? "";
  at("count").textContent = picture?.kept ? shareOf(picture.kept.tokens, picture.kept.of, " tokens kept") : "";
  showStrip();
  drawKept();
}

function shareOf(tokens, of, what = "") {
  return `${tokens} of ${of}${what} (${Number(((tokens / of) * 100).toPrecision(2))} %)`;
}

/* Fit the picture into the stage, and darken what was pruned. Boxes are pixels of the upright original, as is what the
   browser shows: it has turned the picture by its EXIF data. */
function drawKept() {
  const picture = talk.shown, overlay = at("overlay"), kept = picture?.kept;
  if (!picture) return;
  const { naturalWidth: width, naturalHeight: height } = picture.image, stage = at("stage");
  const scale = Math.min(stage.clientWidth / width, stage.clientHeight / height);
  at("frame").style.width = `${Math.round(width * scale)}px`;
  at("frame").style.height = `${Math.round(height * scale)}px`;
  overlay.classList.toggle("on", Boolean(kept) && at("show-kept").checked);
  const lit = kept && `${kept.tokens} of ${kept.of} tokens are lit, the others dimmed.`;
  overlay.setAttribute("aria-label", lit ?? "No tokens are drawn yet.");
  if (!kept) return;
  overlay.width = Math.round(overlay.clientWidth * devicePixelRatio);
  overlay.height = Math.round(overlay.clientHeight * devicePixelRatio);
  const pen = overlay.getContext("2d"), across = overlay.width / kept.size[0], down = overlay.height / kept.size[1];
  pen.fillStyle = VEIL;
  pen.fillRect(0, 0, overlay.width, overlay.height);
  // whole pixels, so that neighbours have no seam
  const boxes = kept.boxes.map(([left, top, right, bottom]) => {
    const [x, y] = [Math.round(left * across), Math.round(top * down)];
    return [x, y, Math.round(right * across) - x, Math.round(bottom * down) - y];
  });
  // models that tile see the whole picture too, coarsely: those larger boxes are lit by half
  const area = ([, , wide, high]) => wide * high, finest = Math.min(...boxes.map(area));
  light(pen, boxes.filter((box) => area(box) > 1.8 * finest), HALF_VEIL);
  light(pen, boxes.filter((box) => area(box) <= 1.8 * finest), null);
}

/* Edges first, then the insides: what is left of the edges goes round the union. */
function light(pen, boxes, veil) {
  const edge = Math.max(1, Math.round(1.25 * devicePixelRatio));
  pen.fillStyle = EDGE;
  for (const [x, y, wide, high] of boxes) pen.fillRect(x - edge, y - edge, wide + 2 * edge, high + 2 * edge);
  for (const box of boxes) pen.clearRect(...box);
  if (!veil) return;
  pen.fillStyle = veil;
  for (const box of boxes) pen.fillRect(...box);
}

// ---- budget and times

const automatic = () => !at("automatic-row").hidden && at("automatic").checked;
const largestBudget = () => model.holov.tokens ?? model.holov.largest_budget ?? model.holov.budget_range[1];

function showBudgetRange() {
  const { default_budget: usual, budget_range: [least, most], target_ttft_ms: target } = model.holov;
  const known = at("budget").max === String(largestBudget()); // the key was changed: leave the slider where it is
  at("budget").max = largestBudget();
  if (!known) at("budget").value = usual;
  at("automatic-row").hidden = target === null;
  at("target").textContent = `Automatic: ${least} to ${most}, for a first token within ${duration(target ?? 0)}`;
  showBudget(null);
}

function showBudget(given) {
  if (!model.holov) return;
  at("budget").disabled = automatic();
  if (automatic() && given) at("budget").value = given;
  const says = shareOf(at("budget").value, largestBudget());
  at("budget-says").textContent = automatic() && !given ? "automatic" : says;
}

function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

/* The bar is the time to the first token; "other" is what no stage accounts for. */
function showTimes(times) {
  const before = BEFORE_TOKEN.filter((stage) => stage in times).map((stage) => [stage, times[stage]]);
  const other = (times.ttft ?? 0) - before.reduce((sum, [, ms]) => sum + ms, 0);
  if (other > 0.1) before.push(["other", other]);
  at("bar").replaceChildren(...before.map(([stage, ms]) => {
    const part = element("i", stage);
    part.style.flexGrow = ms;
    return part;
  }));
  const all = "decode" in times ? [...before, ["decode", times.decode]] : before;
  at("stages").replaceChildren(...all.map(([stage, ms]) => {
    const row = document.createElement("div");
    row.append(element("dt", stage, stage), element("dd", "", duration(ms)));
    return row;
  }));
  at("ttft").textContent = "ttft" in times ? `first token ${duration(times.ttft)}` : "";
}

// ---- what people do

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => talk.stopper?.abort());
at("clear").addEventListener("click", startOver);
at("files").addEventListener("change", async ({ target }) => { await addFiles(target.files); target.value = ""; });
at("show-kept").addEventListener("change", drawKept);
at("budget").addEventListener("input", () => showBudget(null));
at("automatic").addEventListener("change", () => showBudget(null));
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
at("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  showProblem("");
  if (await loadModel()) at("access").open = false;
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  talk.stopper?.abort();
  at("access").open = false;
});
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  addFiles([...event.clipboardData.files]);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    at("stage").classList.toggle("over", name === "dragover");
    if (name === "drop") addFiles([...event.dataTransfer.files]);
  });
}
new ResizeObserver(drawKept).observe(at("stage"));

at("key").value = sessionStorage.getItem(KEY) ?? "";
loadModel();
