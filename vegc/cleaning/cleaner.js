// The grid of ImageCleaner. It knows nothing of files: it asks the kernel for a page, paints a decision at once
// and marks it as unconfirmed until the kernel says that it is on the disk. Images come as bytes of a message
// and live in this page only; nothing of them is part of the widget's state, so none is saved with the notebook.

const KEYS = [
  ['k', 'keep: the label is right'], ['x  or  Delete', 'exclude: leave the image out'], ['s', 'accept the suggested label'],
  ['r', 'relabel: choose a class'], ['w', 'write down why'], ['b', 'duplicates: keep the best, exclude the others'], ['Shift+K', 'keep the rest of the page'],
  ['u  or  Ctrl+Z', 'undo'], ['Shift+U  or  Ctrl+Y', 'redo'], ['arrows  Home  End', 'move'], ['Shift+arrow', 'select along the way'],
  ['Space', 'select or not'], ['Ctrl+A  /  Esc', 'select all / none'], ['Enter  or  z', 'larger image'], ['n  or  PageDown', 'next page'],
  ['p  or  PageUp', 'page before'], ['?', 'these keys'],
];
const DONE = { keep: 'kept', exclude: 'excluded', relabel: 'relabelled' };
// drawn, not written: a font may lack the sign
const ICONS = {
  keep: 'M3 8.5l3.5 3.5L13 4.5', exclude: 'M4 4l8 8M12 4l-8 8', relabel: 'M2.5 8h10M9 4.5L12.5 8 9 11.5', before: 'M10 3L5 8l5 5', next: 'M6 3l5 5-5 5',
  pencil: 'M3 13l.7-3L10.4 3.3l2.3 2.3L6 12.3z', zoom: 'M9.5 2.5h4v4M13.5 2.5l-5 5M6.5 13.5h-4v-4M2.5 13.5l5-5',
};
const SIZES = [['110', 'small'], ['146', 'medium'], ['220', 'large'], ['320', 'largest']]; // pixels a tile has at least
const percent = (p) => (p == null ? '' : p > 0.995 ? '> 99 %' : p < 0.005 ? '< 1 %' : `${Math.round(100 * p)} %`);
const count = (n) => n.toLocaleString('en');
const fold = (s) => s.normalize('NFD').replace(/\p{M}/gu, '').toLowerCase();
let serial = 0; // ids of elements must differ between two cleaners on one page

function h(tag, props = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (v == null || v === false) continue;
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v);
    else if (k === 'class') e.className = v;
    else e.setAttribute(k, v === true ? '' : v);
  }
  e.append(...children.filter((c) => c != null));
  return e;
}

const SVG = ['http', '//www.w3.org/2000/svg'].join(':'); // a name that looks like an address; nothing is asked there
function icon(name) {
  const svg = document.createElementNS(SVG, 'svg'), path = document.createElementNS(SVG, 'path');
  for (const [k, v] of Object.entries({ viewBox: '0 0 16 16', class: 'icon', 'aria-hidden': 'true' })) svg.setAttribute(k, v);
  path.setAttribute('d', ICONS[name]);
  svg.append(path);
  return svg;
}

// how well a class answers what was typed: 0 is the very name, then what begins so, a word that does, what holds it; 4: not at all
function fit(typed, ...names) {
  const one = (name) => (name === typed ? 0 : name.startsWith(typed) ? 1 : name.split(/[^\p{L}\p{N}]+/u).some((w) => w.startsWith(typed)) ? 2 : name.includes(typed) ? 3 : 4);
  return Math.min(...names.map((name) => one(fold(name))));
}

function dataUrl(bytes) { // not a blob: URL: some notebook front ends do not show those
  let s = '';
  for (let i = 0; i < bytes.length; i += 8192) s += String.fromCharCode.apply(null, bytes.subarray(i, i + 8192));
  return `data:image/jpeg;base64,${btoa(s)}`;
}

class Cleaner {
  constructor(model, el) {
    this.model = model;
    this.uid = `vegc-${++serial}`;
    this.items = [];
    this.at = new Map();      // id → place on the page
    this.tiles = new Map();   // id → element
    this.decisions = {};      // id → [action, label, who, why]
    this.unconfirmed = new Map(); // number of a message → what was decided by it, and what stood before
    this.sent = 0;
    this.selected = new Set();
    this.active = 0;
    this.build(el);
    this.listen = (content, buffers) => this.receive(content, buffers || []);
    model.on('msg:custom', this.listen);
    this.ask({ do: 'hello' });
  }

  ask(what) { this.model.send(what); }
  name(label) { return this.names.get(label) ?? label; }
  chance(item) { return item.sure == null ? '' : ` ${percent(item.sure)} is the chance that this suggestion is right, image and label weighed together.`; }

  // ---- what is on the screen
  build(el) {
    const button = (text, key, act, title) => h('button', { type: 'button', title: key ? `${title || text} (${key})` : title,
      onclick: (e) => { act(); if (e.detail && text !== '?') this.grid.focus({ preventScroll: true }); } }, // after a click of the mouse, keys go on working
      text, key ? h('kbd', { 'aria-hidden': 'true' }, key) : null);
    const select = (name, label) => h('label', {}, label, (this.box[name] = h('select', { 'aria-label': label, onchange: () => this.filter() })));
    this.box = {};
    const search = (this.box.text = h('input', { type: 'search', class: 'search', 'aria-label': 'Search', placeholder: 'Search: file, class, reason', autocomplete: 'off',
      oninput: () => { clearTimeout(this.typing); this.typing = setTimeout(() => this.filter(), 250); } }));
    const size = h('select', { 'aria-label': 'Tiles', onchange: () => this.root.style.setProperty('--tile', `${size.value}px`) }, ...SIZES.map(([value, text]) => h('option', { value }, text)));
    size.value = '146';
    this.out = h('span', { class: 'out', hidden: true, title: 'Models are measured on these: what is decided about them changes the measure. ImageCleaner(…, test=True) shows them.' });
    this.say = h('div', { class: 'say', role: 'status', 'aria-live': 'polite' });
    this.counter = h('span', { class: 'counter' });
    this.meter = h('progress', { max: 1, value: 0, 'aria-label': 'decided' });
    this.alert = h('div', { class: 'alert', role: 'alert', hidden: true });
    this.where = h('span', { class: 'where' });
    this.grid = h('div', { class: 'grid', role: 'listbox', 'aria-multiselectable': 'true', 'aria-label': 'Images that need a look, worst first', tabindex: '0', id: this.uid });
    this.help = h('div', { class: 'help', hidden: true, role: 'note', 'aria-label': 'Keys' },
      ...KEYS.flatMap(([k, what]) => [h('kbd', {}, k), h('span', {}, what)]));
    this.buttons = {
      keep: button('Keep', 'k', () => this.decide('keep')),
      exclude: button('Exclude', 'x', () => this.decide('exclude')),
      accept: button('Accept suggestion', 's', () => this.accept(), 'Relabel as suggested'),
      relabel: button('Relabel…', 'r', () => this.choose()),
      best: button('Keep best', 'b', () => this.keepBest(), 'Keep the best of the duplicates, exclude the others'),
      rest: button('Keep rest', 'K', () => this.rest(), 'Keep what is undecided on this page'),
      undo: button('Undo', 'u', () => this.ask({ do: 'undo' })),
      redo: button('Redo', 'U', () => this.ask({ do: 'redo' })),
      before: button(icon('before'), '', () => this.turn(-1), 'Page before (p)'),
      next: button(icon('next'), '', () => this.turn(1), 'Next page (n)'),
      keys: button('?', '', () => this.toggleHelp(), 'Keys'),
    };
    const b = this.buttons;
    b.before.setAttribute('aria-label', 'page before');
    b.next.setAttribute('aria-label', 'next page');
    b.keys.setAttribute('aria-label', 'keys');
    b.keys.setAttribute('aria-expanded', 'false');
    this.root = h('div', { class: 'vegc-cleaner', role: 'region', 'aria-label': 'Image cleaner', 'data-lm-suppress-shortcuts': 'true' },
      h('div', { class: 'bar' }, select('view', 'Show'), select('label', 'Class'), select('kind', 'Issue'), select('split', 'Split'), select('state', 'Decided'), select('sort', 'Order'), h('label', {}, 'Tiles', size), search),
      h('div', { class: 'bar', role: 'toolbar', 'aria-label': 'Decide', 'aria-controls': this.uid }, b.keep, b.exclude, b.accept, b.relabel, b.best, b.rest, b.undo, b.redo),
      h('div', { class: 'bar state' }, this.meter, this.counter, this.out, this.say, h('span', { class: 'pager' }, b.before, this.where, b.next, b.keys)),
      this.help, this.alert, this.grid);
    this.grid.addEventListener('keydown', (e) => this.key(e));
    this.grid.addEventListener('click', (e) => this.click(e));
    this.grid.addEventListener('dblclick', (e) => { if (e.target.closest('.tile') && !e.target.closest('button')) this.zoom(); });
    // what is typed into a box is not a command of the notebook either
    this.root.addEventListener('keydown', (e) => { if (e.target !== this.root) e.stopPropagation(); });
    el.append(this.root);
  }

  tile(item) {
    const pick = (name, text, act) => h('button', { type: 'button', class: `pick ${name}`, tabindex: '-1', 'aria-hidden': 'true', title: text, onclick: (e) => { e.stopPropagation(); this.focus(item.id, e); act(); } }, icon(name === 'relabel' ? 'pencil' : name));
    const guess = item.guess ? h('button', { type: 'button', class: 'guess', tabindex: '-1', 'aria-hidden': 'true', title: `Relabel as ${this.name(item.guess)}.${this.chance(item)}`,
      onclick: (e) => { e.stopPropagation(); this.focus(item.id, e); this.accept([item.id]); } }, icon('relabel'), h('b', {}, this.name(item.guess) + (item.sure != null && item.sure < 0.5 ? '?' : '')), item.sure == null ? null : h('span', {}, percent(item.sure))) : null;
    const badge = item.split === 'test' ? h('span', { class: 'badge test', title: 'A test image: what is decided here changes what is measured' }, 'test') : null;
    const best = item.best ? h('span', { class: 'badge best' }, 'best') : null;
    return h('div', { class: 'tile', role: 'option', id: `${this.uid}-${item.id}`, 'aria-selected': 'false', 'data-id': item.id },
      h('div', { class: 'shown' }, h('div', { class: 'frame' }, h('img', { alt: '', draggable: 'false' }), h('span', { class: 'lost' }),
        h('span', { class: 'badges' }, badge, best), h('span', { class: 'mark' })),
        h('span', { class: 'picks' }, pick('keep', 'Keep', () => this.decide('keep', '', [item.id])), pick('exclude', 'Exclude', () => this.decide('exclude', '', [item.id])),
          pick('relabel', 'Relabel…', () => this.choose([item.id])), pick('zoom', 'Larger', () => this.zoom(item.id)))),
      h('div', { class: 'labels' }, h('span', { class: 'given', title: this.name(item.given) }, this.name(item.given)), guess),
      item.also ? h('div', { class: 'why', title: item.why }, item.also) : null,
      h('div', { class: 'file', title: item.path }, this.view.view === 'duplicates' && item.size ? `${item.size} · ${item.name}` : item.name));
  }

  paintPage() {
    this.tiles.clear();
    const blocks = [];
    let block = null;
    for (const item of this.items) {
      const tile = this.tile(item);
      this.tiles.set(item.id, tile);
      if (this.view.view !== 'duplicates') { blocks.push(tile); continue; }
      if (!block || block.dataset.group !== String(item.group)) {
        const group = this.items.filter((o) => o.group === item.group);
        const differ = new Set(group.map((o) => o.given)).size > 1;
        block = h('div', { class: 'duplicates', role: 'group', 'data-group': item.group, 'aria-label': `${group.length} duplicates` },
          h('div', { class: 'head', 'aria-hidden': 'true' }, `${group.length} duplicates`, differ ? h('span', { class: 'badge differ' }, 'labels differ') : null,
            h('button', { type: 'button', tabindex: '-1', onclick: (e) => { e.stopPropagation(); this.focus(item.id, e); this.keepBest(item.id); } }, 'Keep the best')));
        block.style.setProperty('--n', Math.min(group.length, 6));
        blocks.push(block);
      }
      block.append(tile);
    }
    const nothing = this.view.state === 'left' ? 'Everything here is decided.' : 'No image is like that. Other filters show more.';
    this.grid.replaceChildren(...(blocks.length ? blocks : [h('div', { class: 'empty' }, nothing)]));
    this.grid.classList.toggle('grouped', this.view.view === 'duplicates');
    this.grid.scrollTop = 0;
    for (const item of this.items) this.paint(item.id);
  }

  paint(id) {
    const tile = this.tiles.get(id), item = this.items[this.at.get(id)];
    if (!tile) return;
    const [action, label, who, why] = this.decisions[id] || [];
    tile.dataset.action = action || '';
    tile.querySelector('.mark').replaceChildren(...(action ? [icon(action), h('span', {}, action === 'relabel' ? this.name(label) : DONE[action])] : []));
    tile.querySelector('.mark').title = action ? `${DONE[action]} by ${who}${why ? `: ${why}` : ''}` : '';
    const pending = [...this.unconfirmed.values()].some((was) => was.has(id));
    tile.classList.toggle('pending', pending);
    const chosen = this.selected.has(id), active = this.at.get(id) === this.active;
    tile.classList.toggle('active', active);
    tile.setAttribute('aria-selected', String(chosen));
    const said = [this.name(item.given), item.guess ? `perhaps ${this.name(item.guess)}${item.sure == null ? '' : ` ${percent(item.sure)}`}` : null, action ? `${DONE[action]}${label ? ` as ${this.name(label)}` : ''}` : 'undecided',
      item.split === 'test' ? 'test image' : null, item.best ? 'best of the duplicates' : null, item.lost || item.why || null, item.name];
    tile.setAttribute('aria-label', said.filter(Boolean).join(', '));
    if (active) this.grid.setAttribute('aria-activedescendant', tile.id);
  }

  tell(m) {
    const p = m.progress;
    this.counter.textContent = `${count(p.decided)} of ${count(p.items)} decided · ${count(p.left)} left`;
    this.meter.max = Math.max(p.items, 1);
    this.meter.value = p.decided;
    this.buttons.undo.disabled = !m.can_undo;
    this.buttons.redo.disabled = !m.can_redo;
    if (m.said != null) this.say.textContent = m.said;
  }

  // ---- what the kernel says
  receive(m, buffers) {
    if (m.is === 'page') this.onPage(m);
    else if (m.is === 'pixels') this.onPixels(m, buffers[0]);
    else if (m.is === 'decided') this.onDecided(m);
    else if (m.is === 'zoom') this.onZoom(m, buffers[0]);
    else if (m.is === 'error') this.onError(m);
  }

  onPage(m) {
    if (m.choices) this.onChoices(m.choices);
    Object.assign(this, { items: m.items, view: m.view, page: m.page, pages: m.pages });
    this.at = new Map(m.items.map((item, i) => [item.id, i]));
    this.decisions = m.decisions;
    this.unconfirmed.clear();
    this.alert.hidden = true;
    this.selected.clear();
    this.active = m.at ?? 0;
    // an answer to an earlier question must not take back what was chosen since
    if (this.wanted && Object.entries(this.wanted).every(([k, v]) => m.view[k] === v)) this.wanted = null;
    const typing = this.root.getRootNode().activeElement; // what somebody is typing now is newer than any answer
    for (const [name, box] of Object.entries(this.box)) if (box !== typing || name !== 'text') box.value = (this.wanted ?? m.view)[name];
    this.where.textContent = `page ${count(m.page + 1)} of ${count(m.pages)}`;
    this.buttons.before.disabled = m.page === 0;
    this.buttons.next.disabled = m.page + 1 >= m.pages;
    this.buttons.best.hidden = m.view.view !== 'duplicates';
    this.say.textContent = '';
    this.paintPage();
    this.tell(m);
  }

  onChoices(c) {
    this.names = new Map(c.classes);
    const options = { view: [['images', 'images'], ['duplicates', `duplicates (${c.duplicates})`]], label: [['', 'all'], ...c.labels], kind: [['', 'all'], ...c.kinds], split: [['', 'all'], ...c.splits],
      state: [['', 'or not'], ['left', 'not yet'], ['done', 'yes'], ['keep', 'kept'], ['exclude', 'excluded'], ['relabel', 'relabelled']], sort: c.sorts };
    for (const [name, list] of Object.entries(options)) {
      this.box[name].replaceChildren(...list.map(([value, text, n]) => h('option', { value }, name === 'label' && value ? `${this.name(value)} (${count(n)})` : n == null ? text : `${text} (${count(n)})`)));
    }
    this.box.view.options[1].disabled = !c.duplicates;
    this.out.textContent = `${count(c.kept_out)} test image${c.kept_out === 1 ? '' : 's'} kept out`;
    this.out.hidden = !c.kept_out;
  }

  onPixels(m, buffer) {
    const bytes = buffer ? new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength) : new Uint8Array();
    let from = 0;
    m.ids.forEach((id, i) => {
      const part = bytes.subarray(from, from += m.sizes[i]), tile = this.tiles.get(id);
      if (!tile) return;
      const item = this.items[this.at.get(id)];
      if (part.length) tile.querySelector('img').src = dataUrl(part);
      else { item.lost = m.lost[id]; tile.classList.add('unreadable'); tile.querySelector('.lost').textContent = m.lost[id]; }
      tile.classList.add('painted');
      if (!part.length) this.paint(id);
    });
    this.root.dataset.painted = String(this.grid.querySelectorAll('.painted').length);
  }

  onDecided(m) {
    const before = this.unconfirmed.get(m.n)?.keys() ?? [];
    this.unconfirmed.delete(m.n);
    if (!this.unconfirmed.size) this.alert.hidden = true;
    Object.assign(this.decisions, m.decisions);
    for (const id of new Set([...before, ...Object.keys(m.decisions).map(Number)])) this.paint(id);
    this.tell(m);
  }

  onError(m) {
    this.wanted = null;
    const was = this.unconfirmed.get(m.n) ?? new Map();
    this.unconfirmed.delete(m.n);
    for (const [id, decision] of was) { this.decisions[id] = decision; this.paint(id); }
    this.warn(m.text);
  }

  warn(text) { this.alert.textContent = text; this.alert.hidden = false; }

  // ---- deciding
  chosen() { return this.selected.size ? this.items.map((i) => i.id).filter((id) => this.selected.has(id)) : this.items[this.active] ? [this.items[this.active].id] : []; }

  decide(action, label = '', ids = this.chosen(), why = null) {
    if (ids.length) this.send(ids.map((id) => ({ id, action, label })), why);
  }

  accept(ids = this.chosen()) {
    const rows = ids.map((id) => this.items[this.at.get(id)]).filter((i) => i.guess).map((i) => ({ id: i.id, action: 'relabel', label: i.guess }));
    if (rows.length) this.send(rows, null);
    else this.say.textContent = 'There is no suggestion for this image.';
  }

  send(rows, why) {
    const n = ++this.sent, ids = rows.map((r) => r.id);
    this.unconfirmed.set(n, new Map(ids.map((id) => [id, this.decisions[id]])));
    rows.forEach((r) => { this.decisions[r.id] = [r.action, r.label, 'you', why || '']; });
    this.ask({ do: 'decide', n, rows, why });
    const several = ids.length > 1, touched = new Set([...ids, ...this.selected]);
    this.selected.clear();
    touched.forEach((id) => this.paint(id));
    if (!several && why == null && ids[0] === this.items[this.active]?.id) this.advance();
    // a kernel that is busy answers late, one that is gone never
    setTimeout(() => { if (this.unconfirmed.has(n)) this.warn(`${this.unconfirmed.size === 1 ? 'One decision is' : `${this.unconfirmed.size} decisions are`} not on the disk yet: the kernel is busy, or gone. If it was restarted, run the cell again; only what is pale here is missing.`); }, 5000);
  }

  advance() {
    const n = this.items.length;
    for (let k = 1; k < n; k++) {
      const j = (this.active + k) % n;
      if (!this.decisions[this.items[j].id]) return this.move(j);
    }
    this.say.textContent = this.page + 1 < this.pages ? 'This page is done; n shows the next one.' : 'This page is done.';
  }

  rest() {
    const ids = this.items.map((i) => i.id).filter((id) => !this.decisions[id]);
    if (ids.length) this.decide('keep', '', ids); else this.say.textContent = 'Nothing on this page is undecided.';
  }

  keepBest(id = this.items[this.active]?.id) { if (id != null && this.view.view === 'duplicates') this.ask({ do: 'best', id }); }

  // ---- finding one's way
  filter() {
    this.wanted = Object.fromEntries(Object.entries(this.box).map(([k, b]) => [k, b.value]));
    this.ask({ do: 'show', page: 0, view: this.wanted });
  }
  turn(by) {
    if (by > 0 ? this.page + 1 < this.pages : this.page > 0) this.ask({ do: 'show', page: this.page + by });
    else this.say.textContent = by > 0 ? 'This is the last page.' : 'This is the first page.';
  }
  toggleHelp() { this.help.hidden = !this.help.hidden; this.buttons.keys.setAttribute('aria-expanded', String(!this.help.hidden)); }

  move(to, select = false) {
    if (!this.items.length) return;
    const from = this.active;
    this.active = Math.max(0, Math.min(this.items.length - 1, to));
    if (select) { this.selected.add(this.items[from].id); this.selected.add(this.items[this.active].id); }
    [from, this.active].forEach((i) => this.paint(this.items[i].id));
    this.tiles.get(this.items[this.active].id).scrollIntoView({ block: 'nearest' });
  }

  below(by) { // the place under or above the active tile, whatever the width of the grid
    const here = this.tiles.get(this.items[this.active].id), top = here.offsetTop, left = here.offsetLeft;
    const all = this.items.map((i, k) => [k, this.tiles.get(i.id)]);
    const rows = all.filter(([, t]) => (by > 0 ? t.offsetTop > top : t.offsetTop < top)).map(([, t]) => t.offsetTop);
    if (!rows.length) return this.active;
    const row = by > 0 ? Math.min(...rows) : Math.max(...rows);
    return all.filter(([, t]) => t.offsetTop === row).reduce((best, o) => (Math.abs(o[1].offsetLeft - left) < Math.abs(best[1].offsetLeft - left) ? o : best))[0];
  }

  focus(id, e) { e?.preventDefault(); this.move(this.at.get(id)); this.grid.focus({ preventScroll: true }); }

  click(e) {
    const tile = e.target.closest('.tile');
    if (!tile) return;
    const id = Number(tile.dataset.id), to = this.at.get(id);
    if (e.shiftKey) for (let k = Math.min(to, this.active); k <= Math.max(to, this.active); k++) this.selected.add(this.items[k].id);
    else if (e.ctrlKey || e.metaKey) this.toggle(id);
    else this.selected.clear();
    this.move(to);
    this.items.forEach((i) => this.paint(i.id));
    this.grid.focus({ preventScroll: true });
    this.tellSelection();
  }

  toggle(id) { if (!this.selected.delete(id)) this.selected.add(id); }
  tellSelection() { if (this.selected.size) this.say.textContent = `${count(this.selected.size)} selected`; }

  key(e) {
    if (!this.items.length && !['n', 'p', 'u', 'U', '?', 'PageUp', 'PageDown'].includes(e.key)) return;
    const ctrl = e.ctrlKey || e.metaKey, id = this.items[this.active]?.id;
    const step = (to) => this.move(to, e.shiftKey);
    const act = ctrl
      ? { a: () => { this.items.forEach((i) => this.selected.add(i.id)); this.items.forEach((i) => this.paint(i.id)); }, z: () => this.ask({ do: e.shiftKey ? 'redo' : 'undo' }), Z: () => this.ask({ do: 'redo' }), y: () => this.ask({ do: 'redo' }) }[e.key]
      : {
        k: () => this.decide('keep'), x: () => this.decide('exclude'), Delete: () => this.decide('exclude'), s: () => this.accept(), r: () => this.choose(), w: () => this.note(), b: () => this.keepBest(),
        K: () => this.rest(), u: () => this.ask({ do: 'undo' }), U: () => this.ask({ do: 'redo' }), ArrowLeft: () => step(this.active - 1), ArrowRight: () => step(this.active + 1),
        ArrowUp: () => step(this.below(-1)), ArrowDown: () => step(this.below(1)), Home: () => step(0), End: () => step(this.items.length - 1),
        ' ': () => { this.toggle(id); this.paint(id); }, Escape: () => { this.selected.clear(); this.items.forEach((i) => this.paint(i.id)); },
        Enter: () => this.zoom(), z: () => this.zoom(), n: () => this.turn(1), PageDown: () => this.turn(1), p: () => this.turn(-1), PageUp: () => this.turn(-1), '?': () => this.toggleHelp(),
      }[e.key];
    e.stopPropagation(); // in JupyterLab an x would cut the cell
    if (!act || e.altKey) return;
    e.preventDefault();
    act();
    if (this.selected.size) this.tellSelection();
  }

  // ---- dialogs: a class, a reason, a larger image
  dialog(label, ...children) {
    const d = h('dialog', { 'aria-label': label, onclose: () => { d.remove(); this.grid.focus({ preventScroll: true }); }, onclick: (e) => { if (e.target === d) d.close(); } }, ...children);
    this.root.append(d);
    d.showModal();
    return d;
  }

  choose(ids = this.chosen()) {
    if (!ids.length) return;
    const first = ids.map((id) => this.items[this.at.get(id)].guess).find(Boolean);
    const classes = [...this.names.keys()].sort((a, b) => (b === first) - (a === first) || this.name(a).localeCompare(this.name(b)));
    let shown = [], at = 0;
    const list = h('div', { class: 'classes', role: 'listbox', 'aria-label': 'Classes', id: `${this.uid}-classes` });
    const pick = (c) => { d.close(); this.decide('relabel', c, ids); };
    const paint = () => {
      const typed = fold(input.value.trim()), fits = new Map(classes.map((c) => [c, typed ? fit(typed, this.name(c), c) : 0]));
      shown = classes.filter((c) => fits.get(c) < 4).sort((a, b) => fits.get(a) - fits.get(b)); // the suggestion leads only among equals
      at = Math.max(0, Math.min(at, shown.length - 1));
      list.replaceChildren(...shown.map((c, i) => h('div', { role: 'option', id: `${this.uid}-class-${i}`, 'aria-selected': String(i === at), onclick: () => pick(c) }, this.name(c), c === first ? h('small', {}, 'suggested') : null)));
      input.setAttribute('aria-activedescendant', shown.length ? `${this.uid}-class-${at}` : '');
      list.children[at]?.scrollIntoView({ block: 'nearest' });
    };
    const input = h('input', { type: 'text', placeholder: 'Type to find a class', role: 'combobox', 'aria-expanded': 'true', 'aria-controls': list.id, 'aria-label': 'Class', autocomplete: 'off', oninput: () => { at = 0; paint(); },
      onkeydown: (e) => {
        const by = { ArrowDown: 1, ArrowUp: -1 }[e.key];
        if (by) { e.preventDefault(); at += by; paint(); } else if (e.key === 'Enter' && shown.length) { e.preventDefault(); pick(shown[at]); }
      } });
    const d = this.dialog('Choose a class', h('p', {}, ids.length > 1 ? `Relabel ${ids.length} images as` : `${this.name(this.items[this.at.get(ids[0])].given)} becomes`), input, list);
    paint();
    input.focus();
  }

  note(ids = this.chosen()) {
    const decided = ids.filter((id) => this.decisions[id]);
    if (!decided.length) { this.say.textContent = 'Decide first; then write down why.'; return; }
    const input = h('input', { type: 'text', 'aria-label': 'Why', placeholder: 'Why? For the record', maxlength: '500' });
    input.value = this.decisions[decided[0]][3] || '';
    const save = () => { d.close(); this.send(decided.map((id) => ({ id, action: this.decisions[id][0], label: this.decisions[id][1] })), input.value); };
    input.addEventListener('keydown', (e) => { if (e.key === 'Enter') { e.preventDefault(); save(); } });
    const d = this.dialog('Write down why', h('p', {}, decided.length > 1 ? `${decided.length} decisions` : `${DONE[this.decisions[decided[0]][0]]}: why?`), input,
      h('div', { class: 'row' }, h('button', { type: 'button', onclick: save }, 'Save'), h('button', { type: 'button', onclick: () => d.close() }, 'Cancel')));
    input.focus();
  }

  zoom(id = this.items[this.active]?.id) {
    if (id == null) return;
    const item = this.items[this.at.get(id)], row = (k, v) => (v ? [h('dt', {}, k), h('dd', {}, v)] : []), [action, label, who, why] = this.decisions[id] || [];
    this.zoomed = { id, img: h('img', { alt: `${this.name(item.given)}, ${item.name}` }), lost: h('p', { class: 'lost' }) };
    this.zoomed.img.src = this.tiles.get(id).querySelector('img').src || 'data:,';
    const act = (f) => () => { d.close(); f(); };
    const d = this.dialog('Larger image', h('div', { class: 'large' }, this.zoomed.img, this.zoomed.lost),
      h('dl', {}, ...row('label', this.name(item.given)), ...row('suggested', item.guess && `${this.name(item.guess)}.${this.chance(item)}`), ...row('why here', item.why), ...row('split', item.split), ...row('size', item.size), ...row('file', item.path),
        ...row('decision', action && [DONE[action], label && this.name(label), who && `by ${who}`, why].filter(Boolean).join(' · '))),
      h('div', { class: 'row' }, h('button', { type: 'button', onclick: act(() => this.decide('keep', '', [id])) }, 'Keep'), h('button', { type: 'button', onclick: act(() => this.decide('exclude', '', [id])) }, 'Exclude'),
        item.guess ? h('button', { type: 'button', onclick: act(() => this.accept([id])) }, `Relabel as ${this.name(item.guess)}`) : null, h('button', { type: 'button', onclick: act(() => this.choose([id])) }, 'Relabel…'), h('button', { type: 'button', onclick: () => d.close() }, 'Close')));
    d.classList.add('zoom');
    d.addEventListener('keydown', (e) => {
      const f = { k: () => this.decide('keep', '', [id]), x: () => this.decide('exclude', '', [id]), s: () => this.accept([id]), r: () => this.choose([id]), z: () => {} }[e.key];
      if (f && !e.ctrlKey && !e.metaKey) { e.preventDefault(); act(f)(); }
    });
    this.ask({ do: 'zoom', id });
  }

  onZoom(m, buffer) {
    if (this.zoomed?.id !== m.id) return;
    if (buffer?.byteLength) this.zoomed.img.src = dataUrl(new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength));
    else { this.zoomed.img.hidden = true; this.zoomed.lost.textContent = m.lost; }
  }

  close() { this.model.off('msg:custom', this.listen); this.root.remove(); }
}

export default {
  render({ model, el }) {
    const cleaner = new Cleaner(model, el);
    return () => cleaner.close();
  },
};
