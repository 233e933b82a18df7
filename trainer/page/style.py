"""The style sheet and the script of a run's page."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2128; --quiet: #667080; --rule: #e2e6eb;
  --good: #1a7f4b; --warn: #a86400; --bad: #c8322b; --good-soft: #e4f4ea; --warn-soft: #fcf0db;
  --bad-soft: #fce6e4; --c0: #2f6fde; --c1: #d9660b; --c2: #218a5a; --c3: #8d4fd1; --c4: #c2307a;
  --c5: #64748b; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111418; --card: #1a1f26; --text: #e6e9ee; --quiet: #97a1b0; --rule: #2c333d;
  --good: #52c98a; --warn: #e9ae4b; --bad: #f47e75; --good-soft: #16301f; --warn-soft: #352a13;
  --bad-soft: #3b1d1b; --c0: #6fa3ff; --c1: #ff9d57; --c2: #57c98f; --c3: #bd92f5; --c4: #f07ab2;
  --c5: #9aa8bb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 20px 60px; }
header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 34px 0 12px; }
.chip { border-radius: 99px; padding: 2px 12px; font-size: 13px; font-weight: 600; }
.chip.good { color: var(--good); background: var(--good-soft); }
.chip.warn { color: var(--warn); background: var(--warn-soft); }
.chip.bad { color: var(--bad); background: var(--bad-soft); }
.quiet { color: var(--quiet); font-size: 13px; }
p.quiet { margin: 6px 0 8px; overflow-wrap: anywhere; }
.tiles { display: grid; gap: 12px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(138px, 1fr)); }
.card, .tiles > div, figure { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.tiles > div { padding: 11px 15px 10px; }
.tiles b { display: block; font-size: 23px; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tiles span { display: block; }
.tiles .good { color: var(--good); } .tiles .bad { color: var(--bad); }
ul.checks { list-style: none; margin: 12px 0 0; padding: 10px 16px; display: grid; gap: 2px 28px;
  grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
ul.checks li { padding-left: 24px; position: relative; overflow-wrap: anywhere; }
ul.checks li::before { position: absolute; left: 0; font-weight: 700; }
.checks .good::before { content: "\\2713"; color: var(--good); }
.checks .warn::before { content: "!"; left: 5px; color: var(--warn); }
.checks .bad::before { content: "\\2717"; color: var(--bad); }
.checks .bad { color: var(--bad); font-weight: 600; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
figure { margin: 0; padding: 12px 12px 8px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 2px; overflow-wrap: anywhere;
  display: flex; justify-content: space-between; gap: 10px; }
.at { font-weight: 400; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 12.5px; color: var(--quiet);
  overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 14px; height: 0; vertical-align: middle;
  border-top: 3px solid var(--c); margin-right: 5px; }
.legend i.held-out { border-top-style: dotted; }
.tiles b { white-space: nowrap; }
.legend output { color: var(--text); font-variant-numeric: tabular-nums; font-weight: 600; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick { stroke: var(--quiet); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1; opacity: .3; } .line.held-out { stroke-dasharray: 1 4; stroke-width: 2.2; }
.trail { stroke-width: 1; opacity: .3; }
path.bad { stroke: var(--bad); }
.guide { stroke: var(--quiet); stroke-dasharray: 3 3; visibility: hidden; }
svg:hover .guide { visibility: visible; } .scatter .guide { display: none; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.line { stroke: var(--c); } .dot { fill: var(--c); }
.dot.ring { fill: none; stroke-width: 2; } .ring.first { stroke: var(--quiet); }
.ring.last { stroke: var(--c1); }
.scroll { overflow-x: auto; padding: 4px 16px 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--quiet); }
th, td { padding: 4px 18px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.key { white-space: nowrap; }
td.value { width: 100%; overflow-wrap: anywhere; white-space: pre-wrap; }
tr.warn td { color: var(--warn); font-weight: 600; }
details > summary { cursor: pointer; font-weight: 600; padding: 10px 16px; }
details.card { margin-top: 12px; overflow: hidden; }
.two { display: grid; gap: 0 24px; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.sample { border-top: 1px solid var(--rule); padding: 10px 16px; display: grid; gap: 4px 18px;
  grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) minmax(84px, auto); }
.sample pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; max-height: 22em;
  overflow-y: auto; }
.sample .prompt { color: var(--quiet); }
.sample .reward { text-align: right; font-variant-numeric: tabular-nums; }
.reward b { display: block; font-size: 17px; }
.bar { display: block; height: 4px; border-radius: 2px; background: var(--rule); margin: 3px 0; }
.bar i { display: block; height: 4px; border-radius: 2px; background: var(--c0); }
@media (max-width: 620px) { main { padding: 18px 12px 40px; }
  .sample { grid-template-columns: minmax(0, 1fr); } .sample .reward { text-align: left; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; } h1 { font-size: 22px; } }
@media print { body { background: #fff; } figure, .card { break-inside: avoid; } }
"""

# Hovering a chart puts the values of the nearest step into its legend; leaving it puts back the
# last ones. The page is whole without it.
SCRIPT = """
const data = JSON.parse(document.getElementById("points").textContent);
const show = v => Math.abs(v) >= 1e4 && Math.abs(v) < 1e12 ? v.toLocaleString("en")
  : String(+v.toPrecision(4));
document.querySelectorAll("figure[data-chart]").forEach(figure => {
  const { curves, x, width, left, right } = data[+figure.dataset.chart];
  const svg = figure.querySelector("svg"), guide = svg.querySelector(".guide");
  const outs = [...figure.querySelectorAll("output")], at = figure.querySelector(".at");
  const rest = outs.map(o => o.textContent), restAt = at.textContent;
  const near = (xs, v) => xs.reduce((b, s, i) =>
    Math.abs(s - v) < Math.abs(xs[b] - v) ? i : b, 0);
  const move = event => {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * width;
    const v = x[0] + (px - left) / (right - left) * (x[1] - x[0]);
    const scatter = svg.classList.contains("scatter");
    const xs = curves.map(c => c[scatter ? 1 : 0]);
    const i = xs.map(s => near(s, v));
    const owner = xs.reduce((b, s, k) => !s.length ? b
      : b < 0 || Math.abs(s[i[k]] - v) < Math.abs(xs[b][i[b]] - v) ? k : b, -1);
    if (owner < 0) return;
    if (scatter) {
      outs.forEach((o, k) => { o.textContent = show(curves[0][k + 1][i[0]]); });
    } else curves.forEach((c, k) => { if (c[0].length) outs[k].textContent = show(c[1][i[k]]); });
    at.textContent = "step " + curves[owner][0][i[owner]];
    const gx = left + (xs[owner][i[owner]] - x[0]) / (x[1] - x[0]) * (right - left);
    guide.setAttribute("transform", "translate(" + gx.toFixed(1) + " 0)");
  };
  svg.addEventListener("pointermove", move); svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => {
    outs.forEach((o, k) => { o.textContent = rest[k]; }); at.textContent = restAt;
  });
});
"""
