// The review page: decisions are kept in this browser until they are saved as a file.
'use strict';
const facts = JSON.parse(document.getElementById('facts').textContent); // slug, key, classes: [[slug, name]]
const names = new Map(facts.classes);
const $ = (selector, within = document) => within.querySelector(selector);
const cards = [...document.querySelectorAll('article')];
let made = {}; // path → {action, label, why}
let unsaved = false;
const fold = (s) => s.normalize('NFD').replace(/\p{M}/gu, '').toLowerCase();

// a page that is opened from disk may be refused a memory; then it lasts as long as the tab
const memory = { get: () => { try { return JSON.parse(localStorage.getItem(facts.key)) || {}; } catch { return {}; } },
  set: (v) => { try { localStorage.setItem(facts.key, JSON.stringify(v)); } catch { /* see above */ } } };

function remember() { memory.set({ made, who: $('.who').value }); }

function paint(card) {
  const d = made[card.dataset.path] || (card.dataset.action0 ? { action: card.dataset.action0, label: card.dataset.label0 } : {});
  const { guess } = card.dataset;
  card.dataset.action = d.action || '';
  const pressed = { keep: d.action === 'keep', exclude: d.action === 'exclude', take: d.action === 'relabel' && d.label === guess, other: d.action === 'relabel' && d.label !== guess };
  for (const [name, on] of Object.entries(pressed)) $(`.${name}`, card)?.setAttribute('aria-pressed', String(on));
  $('.other', card).textContent = pressed.other ? `It is ${names.get(d.label) ?? d.label}` : 'Other…';
  const reason = $('.reason', card);
  reason.hidden = !made[card.dataset.path];
  if (document.activeElement !== reason) reason.value = d.why || '';
}

function tell() {
  const n = Object.keys(made).length, left = cards.filter((c) => !c.dataset.action).length;
  $('.count').textContent = `${n} decided here · ${left} left`;
  $('.save').disabled = !n;
  $('.save').textContent = n && !unsaved ? 'Saved' : 'Save decisions';
}

function decide(card, action, label = '') {
  const old = made[card.dataset.path];
  if (old && old.action === action && old.label === label) delete made[card.dataset.path]; // pressed again: take it back
  else made[card.dataset.path] = { action, label, why: old?.why || '' };
  unsaved = true;
  paint(card); tell(); remember();
}

// how well a class answers what was typed: 0 is the very name, then what begins so, a word that does, what holds it; 4: not at all
function fit(typed, ...all) {
  const one = (name) => (name === typed ? 0 : name.startsWith(typed) ? 1 : name.split(/[^\p{L}\p{N}]+/u).some((w) => w.startsWith(typed)) ? 2 : name.includes(typed) ? 3 : 4);
  return Math.min(...all.map((name) => one(fold(name))));
}

function choose(card) {
  const dialog = $('dialog'), input = $('input', dialog), list = $('div', dialog);
  const { guess } = card.dataset;
  const classes = [...facts.classes].sort((a, b) => (b[0] === guess) - (a[0] === guess) || a[1].localeCompare(b[1]));
  const offer = ([slug, name]) => {
    const b = document.createElement('button');
    b.type = 'button'; b.textContent = name;
    b.onclick = () => { dialog.close(); decide(card, 'relabel', slug); card.focus(); };
    return b;
  };
  const fill = () => { // the suggestion leads only among equals
    const typed = fold(input.value.trim()), fits = new Map(classes.map((c) => [c, typed ? fit(typed, ...c) : 0]));
    list.replaceChildren(...classes.filter((c) => fits.get(c) < 4).sort((a, b) => fits.get(a) - fits.get(b)).map(offer));
  };
  input.value = '';
  input.oninput = fill;
  input.onkeydown = (e) => { if (e.key === 'Enter') { e.preventDefault(); list.firstElementChild?.click(); } };
  fill();
  dialog.showModal();
  input.focus();
}

function filter() {
  const show = $('.show').value, label = $('.class').value, typed = fold($('.search').value.trim());
  let n = 0;
  for (const c of cards) {
    c.hidden = (label && c.dataset.given !== label) || (show === 'open' && c.dataset.action) || (show === 'done' && !c.dataset.action)
      || (typed && !fold(`${c.dataset.path} ${$('.body', c).textContent}`).includes(typed));
    n += !c.hidden;
  }
  $('.empty').hidden = n > 0;
}

const KEYS = { sure: (c) => -(c.dataset.sure || -1), class: (c) => fold($('.given', c).textContent), file: (c) => $('.file', c).textContent };
function order() { // equals stay in the order of review
  const key = KEYS[$('.sort').value] ?? ((c) => cards.indexOf(c));
  const rows = cards.map((c) => [key(c), c]).sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
  $('.cards').prepend(...rows.map(([, c]) => c));
}

function csv() {
  const cell = (v) => (/[",\r\n;]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v);
  const who = $('.who').value.trim() || 'review page';
  const rows = cards.filter((c) => made[c.dataset.path]).map((c) => { const d = made[c.dataset.path]; return [c.dataset.path, d.action, d.label, who, d.why].map(cell).join(','); });
  return `\ufeff${['path,action,label,who,why', ...rows].join('\r\n')}\r\n`; // the mark tells spreadsheets that it is UTF-8
}

function save() {
  const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([csv()], { type: 'text/csv' }));
  a.download = `decisions-${facts.slug}.csv`;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
  unsaved = false;
  tell();
}

for (const card of cards) {
  card.dataset.action0 = card.dataset.action; // as it stood when the page was made
  card.dataset.label0 = card.dataset.label;
  const act = { keep: () => decide(card, 'keep'), exclude: () => decide(card, 'exclude'), take: () => decide(card, 'relabel', card.dataset.guess), other: () => choose(card) };
  for (const [name, f] of Object.entries(act)) $(`.${name}`, card)?.addEventListener('click', f);
  $('.reason', card).addEventListener('input', (e) => { made[card.dataset.path].why = e.target.value; unsaved = true; tell(); remember(); });
  card.addEventListener('keydown', (e) => {
    if (e.target !== card || e.ctrlKey || e.metaKey || e.altKey) return;
    const name = { k: 'keep', x: 'exclude', s: 'take', r: 'other' }[e.key];
    if (name && $(`.${name}`, card)) { e.preventDefault(); act[name](); }
  });
}
const before = memory.get();
made = Object.fromEntries(Object.entries(before.made || {}).filter(([path]) => cards.some((c) => c.dataset.path === path)));
unsaved = Object.keys(made).length > 0;
$('.who').value = before.who || '';
$('.who').addEventListener('input', remember);
$('.save').addEventListener('click', save);
$('.show').addEventListener('change', filter);
$('.class').addEventListener('change', filter);
$('.search').addEventListener('input', filter);
$('.sort').addEventListener('change', order);
$('.size').addEventListener('change', (e) => $('.cards').style.setProperty('--wide', `${e.target.value}px`));
addEventListener('beforeunload', (e) => { if (unsaved) e.preventDefault(); });
cards.forEach(paint);
tell();
