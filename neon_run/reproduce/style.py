"""How report.html looks. In the file itself, which has to stand alone."""

STYLE = """\
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --paper: #ffffff; --accent: #0b6e99; --warm: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 28px 64px; background: var(--paper); }
h1 { font-size: 30px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 8px; }
header p { font-size: 18px; margin: 0 0 20px; } .small, figcaption { color: var(--soft); font-size: 14px; }
.cards { display: flex; flex-wrap: wrap; gap: 16px; }
.card { flex: 1 1 220px; border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; }
.card.neon { border-color: var(--accent); background: #eef7fb; }
.card b { font-size: 34px; font-variant-numeric: tabular-nums; margin-right: 8px; }
.card span { color: var(--soft); } .card em { display: block; font-style: normal; color: var(--soft); font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: 14px; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
table.hashes td { text-align: left; font-size: 13px; } table.hashes th { text-align: left; }
table.hashes td:last-child { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 24px; }
figure { margin: 0; max-width: 640px; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); } svg text.label { font-size: 13px; fill: var(--ink); }
svg .grid { stroke: #eceff2; } svg .tick { stroke: var(--soft); } svg .box { fill: none; stroke: #aab3bc; }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2; } svg .measured { fill: var(--accent); }
svg .best { fill: var(--warm); stroke: #fff; stroke-width: 1.5; } svg .searched { fill: #b7c0c9; }
svg .base { stroke: var(--soft); stroke-dasharray: 5 4; } svg .note { font-size: 12px; }
svg .fit { opacity: 0.55; } svg .point { stroke: #fff; stroke-width: 1.5; }
svg .ring { fill: none; stroke: var(--warm); stroke-width: 3; }
.bar { font-size: 12px; color: var(--soft); margin: 2px 18px 6px 62px; }
.bar i { display: block; height: 10px; border-radius: 3px; } .bar div { display: flex; justify-content: space-between; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 24px; }
.grid-of-images { display: grid; gap: 3px; }
.grid-of-images img { width: 100%; display: block; image-rendering: pixelated; }
pre { font-size: 12px; overflow-x: auto; background: #f4f6f8; padding: 12px; border-radius: 6px; }
summary { cursor: pointer; color: var(--accent); margin-top: 12px; }
@media print { body, main { background: none; padding: 0; } section { break-inside: avoid; } }
"""
