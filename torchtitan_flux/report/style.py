"""The page's style sheet: light and dark, from 320 pixels of width on."""

CSS = """
:root {
  --back: #f7f7f5; --card: #fff; --text: #1c1e21; --soft: #61666d; --line: #e3e3df;
  --rule: #ecece8; --c0: #1f6fb2; --c1: #c4561b; --c2: #9aa0a6; --good: #2c7a4b; --bad: #b3261e;
  --s0: #46327e; --s1: #3b528b; --s2: #2c728e; --s3: #21918c; --s4: #28ae80; --s5: #74b53a;
  --s6: #c7a412; --s7: #d9731a; --a0: #c3d5e6; --a1: #8fb6d9; --a2: #5592c6; --a3: #14558f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #141517; --card: #1c1e21; --text: #e6e6e3; --soft: #9a9fa6; --line: #303338;
    --rule: #282b2f; --c0: #6cb2ee; --c1: #f0935a; --c2: #7b8087; --good: #6cc391; --bad: #f2857d;
    --s0: #9d8be0; --s1: #7d9be6; --s2: #5cb0d4; --s3: #43c2bb; --s4: #52d19c; --s5: #9bd562;
    --s6: #e6c84a; --s7: #f39a52; --a0: #3a4a5a; --a1: #466f96; --a2: #5a9bd0; --a3: #a5d3fa;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1360px; padding: 28px 24px 40px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 44px 0 14px; font-weight: 650; }
h3 { font-size: 14px; margin: 0; font-weight: 650; }
p { margin: 6px 0; } .warning { color: var(--bad); }
small, .soft { color: var(--soft); font-size: 13px; }
code { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.head { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
.state { font-size: 13px; font-weight: 600; padding: 1px 10px; border-radius: 99px;
  border: 1px solid currentColor; }
.finished { color: var(--good); } .running { color: var(--c0); } .stopped { color: var(--c1); }
.progress { height: 4px; background: var(--line); border-radius: 2px; margin: 16px 0;
  overflow: hidden; }
.progress div { height: 100%; background: var(--c0); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px;
  margin: 0; padding: 0; list-style: none; }
.tiles li { padding: 12px 14px; flex: 1 1 150px; max-width: 320px; }
.tiles b { display: block; font-size: 22px; line-height: 1.3; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr));
  gap: 14px; }
.bar { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: center; margin: 44px 0 14px; }
.bar h2 { margin: 0; margin-right: auto; }
label { display: inline-flex; gap: 7px; align-items: center; font-size: 14px; min-height: 32px; }
input { accent-color: var(--c0); }
figure { margin: 0; min-width: 0; }
.chart { padding: 12px 14px 8px; display: grid; grid-row: span 3; row-gap: 0;
  grid-template-rows: subgrid; grid-template-columns: 100%; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 8px; align-items: baseline;
  align-content: start; }
.read { flex: 0 0 100%; display: flex; flex-wrap: wrap; gap: 0 12px; margin: 4px 0 6px;
  font-size: 13px; align-items: baseline; }
.at { color: var(--soft); min-width: 5.5em; }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; margin: 0; padding: 0; list-style: none; }
.legend span { color: var(--soft); } .legend b { font-weight: 600; }
.legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px;
  margin-right: 5px; vertical-align: 3px; background: currentColor; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; outline-offset: 3px; }
svg text { font-size: 11px; fill: var(--soft); } svg .bad { fill: var(--bad); font-size: 12px;
  text-anchor: middle; }
svg path { fill: none; } svg .rule { stroke: var(--rule); } svg .axis { stroke: var(--line); }
svg .cursor { stroke: var(--soft); stroke-dasharray: 2 2; visibility: hidden; }
svg .raw, svg .mean { stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
svg .dot { fill: currentColor; }
svg .mean, svg .log { display: none; }
.smooth svg .mean { display: inline; } .smooth svg .noisy { opacity: 0.25; }
.log svg .log { display: inline; } .log svg .lin { display: none; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.s6 { color: var(--s6); } .s7 { color: var(--s7); } .a0 { color: var(--a0); }
.a1 { color: var(--a1); } .a2 { color: var(--a2); } .a3 { color: var(--a3); }
summary { cursor: pointer; color: var(--soft); font-size: 13px; padding: 6px 0; }
.scroll { overflow: auto; max-height: 320px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; } thead th { color: var(--soft); font-size: 13px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.numbers th, .numbers td { text-align: right; font-size: 13px; padding: 2px 10px 2px 0;
  font-weight: 400; }
.wide { padding: 6px 16px; }
.wide th { font-weight: 400; } .wide thead th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; } section > div > div > h3 { margin: 8px 0 6px; }
.wide td, .wide th { overflow-wrap: anywhere; } .short td, .short th { overflow-wrap: normal; }
.wide .differs { font-weight: 700; }
.wide small { display: block; }
.pair th { width: 34%; color: var(--soft); }
.config table { table-layout: fixed; } .config th:first-child { width: 50%; }
.config td:last-child { color: var(--soft); }
.grids { padding: 16px; }
.grids h3 { margin-bottom: 10px; }
.step { display: grid; grid-template-columns: minmax(120px, 260px) minmax(0, max-content);
  column-gap: 16px; margin-bottom: 20px; }
.scripted .step { display: none; margin: 0; } .scripted .step.on { display: grid; }
.step h3, .step > div { grid-column: 2; } .step ol { grid-area: 2 / 1; }
.step .only { grid-column: 1 / -1; }
.step ol { display: grid; grid-auto-rows: 1fr; margin: 0; padding: 0; list-style: none;
  font-size: 14px; text-align: right; color: var(--soft); height: 0; min-height: 100%; }
.step li { display: flex; align-items: center; justify-content: flex-end; min-height: 0;
  line-height: 1.25; overflow: hidden; }
.step li span { overflow: hidden; display: -webkit-box; -webkit-line-clamp: var(--lines, 2);
  -webkit-box-orient: vertical; }
.step img { display: block; width: auto; height: auto; max-width: 100%; max-height: 82vh;
  cursor: zoom-in; }
.small { image-rendering: pixelated; }
.step .small { width: min(100%, 640px); object-fit: contain; object-position: left; }
.steps { display: none; align-items: center; gap: 14px; margin: 14px 0 0; }
.scripted .steps { display: flex; } .steps input { flex: 1; max-width: 640px; min-width: 0; }
.strip { display: flex; gap: 8px; overflow-x: auto; padding: 12px 0 2px; }
.strip button { border: 2px solid transparent; border-radius: 6px; padding: 3px; cursor: pointer;
  background: none; color: var(--soft); font: 12px/1.4 inherit; flex: none; }
.strip button[aria-current=true] { border-color: var(--c0); color: var(--text); }
.strip img { display: block; width: 84px; height: 84px; object-fit: cover; object-position: top; }
dialog { border: 0; padding: 0; background: none; max-width: 100vw; max-height: 100vh; }
dialog img { display: block; max-width: 96vw; max-height: 96vh; cursor: zoom-out; }
dialog img.small { min-width: min(88vw, 88vh); }
dialog::backdrop { background: rgb(0 0 0 / 0.8); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 14px; align-items: start; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { padding: 18px 12px 28px; }
  .tiles { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; } .tiles b { font-size: 19px; }
  .tiles li { padding: 9px 11px; }
  .grids { padding: 12px; } .wide { padding: 4px 12px; }
  .step, .scripted .step.on { display: block; } .scripted .step { display: none; }
  .step h3 { margin-bottom: 8px; }
  .step > div { margin-bottom: 10px; } .step img { width: 100%; max-height: none; }
  .step ol { display: block; height: auto; font-size: 13px; text-align: left; padding-left: 2em;
    list-style: decimal; columns: 150px; }
  .step li { display: list-item; overflow: visible; }
  .config thead { display: none; } .config tr { display: block; padding: 8px 0;
    border-bottom: 1px solid var(--rule); }
  .config tr > * { display: block; width: auto !important; border: 0; padding: 1px 0; }
  .config td:last-child::before { content: "default "; font-size: 13px; }
}
@media print { .bar label, .steps, summary { display: none !important; } }
"""
