// A rollout's tokens by turns. Tokens become elements when they come near the view: a rollout may have 100,000.

const CHUNK = 400; // about as many tokens are drawn together
const DRAWN_AT_ONCE = 6; // chunks that do not wait for the reader to come near
const LINE = 21; // pixels, as in page.css
const CHARACTER = 7.53; // pixels, about
const GUTTER = 150;
const FOLD_ABOVE = 800; // a longer context shows its beginning and its end
const FOLD_HEAD = 160;
const FOLD_TAIL = 320;

class TokenView {
  constructor(rollout, scroller) {
    this.rollout = rollout;
    this.chunks = [];
    this.columns = Math.max(20, Math.floor((scroller.clientWidth - GUTTER) / CHARACTER));
    this.here = null;
    this.watcher = new IntersectionObserver(
      (seen) => seen.filter((one) => one.isIntersecting).forEach((one) => this.fill(this.chunks[one.target.dataset.chunk])),
      { root: scroller, rootMargin: "800px" },
    );
    this.node = el(
      "div",
      { className: "tokens", tabIndex: 0, role: "group", "aria-label": "Tokens. Left and right move token by token, with shift turn by turn." },
      rollout.segments.map((segment, s) => this.segment(segment, s)),
    );
    this.node.addEventListener("pointerover", (event) => {
      const token = event.target.closest(".t");
      if (token) this.point(token);
      else hideTip();
    });
    this.node.addEventListener("pointerleave", hideTip);
    this.node.addEventListener("blur", () => this.leave());
    this.node.addEventListener("click", (event) => {
      const token = event.target.closest(".t");
      if (token) this.go(Number(token.dataset.s), Number(token.dataset.p));
    });
    this.node.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      this.step(event.key === "ArrowRight" ? 1 : -1, event.shiftKey);
      event.preventDefault();
    });
  }

  segment(segment, s) {
    const tokens = unpacked(segment);
    const trained = tokens.engine.length;
    const later = segment.trained_at !== null && segment.trained_at !== segment.version ? `, trained in step ${segment.trained_at}` : "";
    return el(
      "section",
      { className: "segment" },
      el(
        "h3",
        {},
        `Segment ${s}`,
        el("small", {}, `weights of step ${segment.version}${later} · ${plural(tokens.index.length, "token")}, ${short(trained)} trained`),
      ),
      tokens.turns.map((turn) => this.turn(segment, s, turn)),
    );
  }

  turn(segment, s, turn) {
    const tokens = unpacked(segment);
    const length = turn.end - turn.start;
    const flow = el("div", { className: "flow" });
    if (!turn.trained && length > FOLD_ABOVE) {
      const [from, to] = [turn.start + FOLD_HEAD, turn.end - FOLD_TAIL];
      const middle = el("div", { className: "middle" });
      const open = el("button", { className: "fold" }, `… ${short(to - from)} more tokens of context`);
      const unfold = () => {
        if (!open.isConnected) return;
        open.remove();
        middle.append(...this.pieces(segment, s, from, to));
      };
      open.addEventListener("click", unfold);
      middle.append(open);
      this.chunks.push({ s, start: from, end: to, unfold });
      flow.append(...this.pieces(segment, s, turn.start, from), middle, ...this.pieces(segment, s, to, turn.end));
    } else {
      flow.append(...this.pieces(segment, s, turn.start, turn.end));
    }
    let note = null;
    let call = null;
    if (turn.trained) {
      const logprobs = tokens.engine.subarray(turn.first, turn.first + length);
      call = callAt(segment, turn.start);
      note = el("small", { title: "mean logprob of the engine" }, `${short(logprobs.reduce((a, b) => a + b, 0) / length, 2)} nats`);
    }
    return el(
      "div",
      { className: turn.trained ? "turn sampled" : "turn context" },
      el(
        "div",
        { className: "gutter" },
        el("b", {}, turn.trained ? (call ? `call ${call.index}` : "sampled") : "context"),
        el("small", {}, plural(length, "token")),
        note,
        call?.finish === "length" && el("small", { className: "cut", title: "It ran into the token limit" }, "cut off"),
      ),
      flow,
    );
  }

  /** Blocks that hold, or will hold, tokens `start` to `end`. */
  pieces(segment, s, start, end) {
    const { index } = unpacked(segment);
    const found = [];
    for (let from = start; from < end; ) {
      const [to, height] = this.cut(index, from, end);
      const node = el("div", { className: "chunk", data: { chunk: this.chunks.length } });
      const chunk = { segment, s, start: from, end: to, node };
      this.chunks.push(chunk);
      if (this.chunks.length <= DRAWN_AT_ONCE) this.fill(chunk);
      else {
        node.style.height = `${height}px`;
        this.watcher.observe(node);
      }
      found.push(node);
      from = to;
    }
    return found;
  }

  /** Where a block that begins at `from` ends, behind a line's end where there is one, and about how high it will be. */
  cut(index, from, end) {
    const words = texts(index, from, Math.min(end, from + 2 * CHUNK));
    let length = words.length <= CHUNK ? words.length : words.findIndex((word, i) => i >= CHUNK / 2 && word.includes("\n")) + 1;
    if (length === 0) length = CHUNK;
    const lines = words.slice(0, length).join("").replace(/\n$/, "").split("\n");
    return [from + length, LINE * lines.reduce((sum, line) => sum + Math.ceil((line.length + 1) / this.columns), 0)];
  }

  fill(chunk) {
    if (!chunk.node || chunk.filled) return;
    chunk.filled = true;
    this.watcher.unobserve(chunk.node);
    const { segment, s, start, end, node } = chunk;
    const tokens = unpacked(segment);
    const words = texts(tokens.index, start, end);
    const turn = turnAt(tokens, start);
    const broken = this.brokenAt(s);
    const spans = words.map((text, i) => {
      const position = start + i;
      const span = document.createElement("span");
      span.textContent = visible(text).replaceAll("\n", "↵\n");
      span.className = turn.trained ? "t on" : "t";
      if (text === "") span.className += " part";
      if (SPECIAL.has(tokens.index[position])) span.className += " special";
      if (position === broken) span.className += " broken";
      span.dataset.s = s;
      span.dataset.p = position;
      if (turn.trained) {
        const k = turn.first + position - turn.start;
        span.style.setProperty("--surprise", clamp(-tokens.engine[k] / 4, 0, 1).toFixed(3));
        if (tokens.trainer) span.style.setProperty("--gap", gapShade(tokens.engine[k] - tokens.trainer[k]).toFixed(3));
      }
      return span;
    });
    node.replaceChildren(...spans);
    node.style.height = "";
  }

  /** Position at which segment `s` parts from what was served, where the log lets that be known. */
  brokenAt(s) {
    return this.rollout.breaks.find((broke) => segmentOf(this.rollout, broke) === s)?.token_offset ?? null;
  }

  element(s, position) {
    this.chunks.find((one) => one.unfold && one.s === s && one.start <= position && position < one.end)?.unfold();
    const chunk = this.chunks.find((one) => one.node && one.s === s && one.start <= position && position < one.end);
    if (!chunk) return null;
    // Its neighbours too: drawn later, they would push the token out of view.
    const near = (other) => other.node && other.s === s && Math.abs(other.start - chunk.start) <= 2 * CHUNK;
    this.chunks.filter(near).forEach((other) => this.fill(other));
    return chunk.node.children[position - chunk.start];
  }

  go(s, position) {
    const token = this.element(s, position);
    if (!token) return;
    this.node.querySelector(".t.here")?.classList.remove("here");
    token.classList.add("here");
    this.node.classList.add("walked"); // the token has the ring
    this.here = { s, position };
    this.node.focus({ preventScroll: true });
    token.scrollIntoView({ block: "nearest" });
    this.point(token);
  }

  step(by, byTurn) {
    if (!this.here) return this.go(0, 0);
    const { s, position } = this.here;
    const tokens = unpacked(this.rollout.segments[s]);
    let next = position + by;
    if (byTurn) {
      const at = tokens.turns.indexOf(turnAt(tokens, position));
      next = tokens.turns[at + by]?.start ?? (by < 0 ? -1 : tokens.index.length);
    }
    if (next >= 0 && next < tokens.index.length) return this.go(s, next);
    const other = this.rollout.segments[s + by];
    if (other) this.go(s + by, by > 0 ? 0 : unpacked(other).index.length - 1);
  }

  point(token) {
    showTip(token, tokenFacts(this.rollout, Number(token.dataset.s), Number(token.dataset.p)));
  }

  leave() {
    this.node.classList.remove("walked");
    this.node.querySelector(".t.here")?.classList.remove("here");
    hideTip();
  }

  close() {
    this.watcher.disconnect();
    hideTip();
  }
}

/** 0 for a difference of a millionth of a nat or less, 1 for a tenth or more. */
function gapShade(difference) {
  return clamp((Math.log10(Math.abs(difference) + 1e-9) + 6) / 5, 0, 1);
}

/** The segment that a splice break opened: the one whose first call it names; -1 where none trains, or nobody knows. */
function segmentOf(rollout, broke) {
  return rollout.segments.findIndex((segment) => segment.calls[0]?.[2] === broke.call_index);
}

function tokenFacts(rollout, s, position) {
  const segment = rollout.segments[s];
  const tokens = unpacked(segment);
  const turn = turnAt(tokens, position);
  const [text] = texts(tokens.index, position, position + 1);
  const facts = [["token id", RUN.tokens.ids[tokens.index[position]]], ["position", `${position} of segment ${s}`]];
  if (!turn.trained) return { title: JSON.stringify(text), facts: [...facts, ["trained", "no, context"]] };
  const k = turn.first + position - turn.start;
  const engine = tokens.engine[k];
  const trainer = tokens.trainer?.[k];
  return {
    title: text === "" ? "part of a character" : JSON.stringify(text),
    facts: [
      ...facts,
      ["engine", `${engine.toFixed(6)} nats (${(100 * Math.exp(engine)).toPrecision(3)} %)`],
      ["trainer", trainer === undefined ? "not recorded" : `${trainer.toFixed(6)} nats`],
      ["gap", trainer === undefined ? "–" : Math.abs(engine - trainer) < 1e-7 ? "none (< 1e−7)" : `${short(Math.abs(engine - trainer))} nats`],
      ["weight version", callAt(segment, position)?.version ?? segment.version],
    ],
  };
}

/** The call that sampled a token; unknown in logs of earlier versions. */
function callAt(segment, position) {
  const found = segment.calls.find(([start, stop]) => start <= position && position < stop);
  if (!found) return null;
  const [, , index, version, finish] = found;
  return { index, version, finish };
}

function showTip(anchor, { title, facts }) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(el("strong", {}, title), el("dl", {}, facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))])));
  tip.hidden = false;
  const [box, size] = [anchor.getClientRects()[0] ?? anchor.getBoundingClientRect(), tip.getBoundingClientRect()];
  const below = box.bottom + 6 + size.height < innerHeight;
  tip.style.left = `${clamp(box.left, 8, innerWidth - size.width - 8)}px`;
  tip.style.top = `${below ? box.bottom + 6 : box.top - size.height - 6}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}
