"""How the page looks: plain CSS, in light and in dark."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1e2329; --soft: #5b6470; --paper: #ffffff; --tile: #f4f6f8; --line: #d9dee4; --bar: #4682b4;
  --good: #1a7f37; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --soft: #9aa4b0; --paper: #15191e; --tile: #1e242b; --line: #323a44; --bar: #6aa5d8;
    --good: #57c173; --bad: #ff7b72;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 0.6rem; }
.under { color: var(--soft); margin: 0.2rem 0 1.4rem; overflow-wrap: anywhere; }
.verdict { font-weight: 600; padding: 0.5rem 0.8rem; border: 2px solid currentColor; border-radius: 6px; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0.8rem; }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 0.7rem 0.9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
.tile span { color: var(--soft); font-size: 0.85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 4rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
img { display: block; width: 100%; min-width: 60rem; background: #ffffff; border-radius: 6px; }
ul { margin: 0; padding-left: 1.2rem; }
footer {
  color: var(--soft); font-size: 0.85rem; margin-top: 2.5rem; padding-top: 0.6rem; border-top: 1px solid var(--line);
}
footer code { overflow-wrap: anywhere; }
@media print { body { max-width: none; } h2 { break-after: avoid; } }
"""
