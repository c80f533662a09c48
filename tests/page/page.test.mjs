// The operator's page in a real browser:
//
//     cargo build --release && npm --prefix tests/page install && npm --prefix tests/page test
//
// Needs Chromium (Debian: chromium). SCREENSHOTS=DIR keeps what the page looked like.
import assert from 'node:assert';
import { execFileSync, spawn } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import puppeteer from 'puppeteer-core';
import { example, snippets } from '../../admin/examples.mjs';

const root = fileURLToPath(new URL('../..', import.meta.url));
const chromium = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find(existsSync);
const axe = readFileSync(join(root, 'tests/page/node_modules/axe-core/axe.min.js'), 'utf8');
const dir = mkdtempSync(join(tmpdir(), 'mb-page-'));
const hostile = `<img src=x onerror="document.title='owned'">`;
const PATIENCE = 60000;

let server, browser, page, wire, adminPort;

async function start(port = 0) {
  const process = spawn(join(root, 'target/release/mb-server'), ['serve', '--config', join(dir, 'mb.toml'), '--port', '0', '--admin-port', String(port)], {
    env: { ...globalThis.process.env, XDG_STATE_HOME: join(dir, 'state'), XDG_CACHE_HOME: join(root, 'target/page-cache') },
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  let said = '';
  for await (const piece of process.stdout) {
    said += piece;
    if (said.includes('ready in')) break;
  }
  wire = Number(/listening {2}127\.0\.0\.1:(\d+)/.exec(said)[1]);
  adminPort = Number(/admin {6}http:\/\/127\.0\.0\.1:(\d+)/.exec(said)[1]);
  return process;
}

const gone = (process) => new Promise((done) => { process.once('exit', done); process.kill('SIGTERM'); });

/** Sends one frame and keeps the connection open. */
function send(topic, id, payload) {
  const body = Buffer.from(`REQUEST:${topic}:1.0.0:${id}::3600000\n${JSON.stringify(payload)}`);
  const head = Buffer.alloc(8);
  head.writeUInt32BE(body.length);
  const socket = connect(wire, '127.0.0.1');
  socket.write(Buffer.concat([head, body]));
  socket.on('error', () => {});
  return socket;
}

const until = (text) => page.waitForFunction((wanted) => document.body.innerText.includes(wanted), { timeout: PATIENCE }, text);
const without = (text) => page.waitForFunction((wanted) => !document.querySelector('main').innerText.includes(wanted), { timeout: PATIENCE }, text);
/**
 * Clicks what a selector finds, in a row that holds a text, as soon as it is there. In one step within the page, which
 * is redrawn every second: a click of the pointer could begin on one element and end on the next.
 */
const press = (selector, text = '') => page.waitForFunction((wanted, within) => {
  const found = [...document.querySelectorAll(wanted)].find((element) => (element.closest('tr') ?? element).textContent.includes(within) && element.checkVisibility());
  found?.click();
  return Boolean(found);
}, { timeout: PATIENCE }, selector, text);
const go = (hash) => page.evaluate((to) => { location.hash = to; }, hash);

before(async () => {
  assert.ok(chromium, 'chromium is missing: apt-get install chromium');
  const services = join(dir, 'services');
  mkdirSync(services);
  for (const [from, name] of [['services/dist/calc.wasm', 'calc'], ['services/dist/echo.wasm', 'echo'], ['services/dist/granted/counter.wasm', 'counter'], ['services/dist/granted/order.wasm', 'order'], ['tests/guests/dist/hostile.wasm', 'hostile']]) {
    copyFileSync(join(root, from), join(services, `${name}.wasm`));
  }
  writeFileSync(join(services, `${hostile}.wasm`), 'no wasm');
  writeFileSync(join(dir, 'mb.toml'), `services_dir = "${services}"\n[services.counter.grants]\nkeyvalue = true\n[services.order.grants]\ncalls = ["calc.add", "counter.add"]\nconfig = { currency = "EUR" }\n`);
  server = await start();
  browser = await puppeteer.launch({ executablePath: chromium, args: ['--no-sandbox', '--disable-gpu'], timeout: PATIENCE });
  page = await browser.newPage();
  page.setDefaultTimeout(PATIENCE);
  const problems = [];
  page.on('pageerror', (error) => problems.push(error.message));
  page.problems = problems;
  await page.setViewport({ width: 1440, height: 900 });
  await page.goto(`http://127.0.0.1:${adminPort}/`);
  await until('Requests a second');
});

after(async () => {
  await browser?.close();
  if (server?.exitCode === null) await gone(server);
  rmSync(dir, { recursive: true, force: true });
});

test('services are shown, and what is hostile stays text', async () => {
  await until('ready');
  await until(hostile);
  assert.strictEqual(await page.title(), 'mb-server');
  const order = send('order.create', 'o-1', { customer: hostile, items: [{ name: 'tea', price: 1, quantity: 1 }] });
  await go('#/log');
  await until(`order 1 of ${hostile}`);
  assert.strictEqual(await page.title(), 'mb-server');
  assert.strictEqual(await page.$$eval('main img', (images) => images.length), 0);
  order.destroy();
});

test('connections come and go, and one is closed by its button', async () => {
  const token = readFileSync(join(dir, 'state/mb-server/admin.token'), 'utf8').trim();
  await page.type('#token', token);
  await page.click('#access button');
  await go('#/connections');
  const socket = send('calc.add', 'c-1', { a: 1, b: 2 });
  const ended = new Promise((done) => socket.once('close', done));
  socket.resume();
  const port = await new Promise((done) => (socket.localPort ? done(socket.localPort) : socket.once('connect', () => done(socket.localPort))));
  // Others may still be listed.
  await press('main button[aria-label^="Close connection"]', `127.0.0.1:${port}`);
  await ended;
  await until('No connections.');
});

test('a call is stopped by its button', async () => {
  await go('#/calls');
  const socket = send('hostile.spin', 'spin-1', null);
  const answer = new Promise((done) => socket.once('data', (data) => done(data.toString())));
  await until('spin-1');
  await press('main button[aria-label^="Stop call"]', 'spin-1');
  assert.match(await answer, /SERVICE_FAILED.*killed/s);
  await page.waitForFunction(() => !document.querySelector('main button[aria-label^="Stop call"]'), { timeout: PATIENCE });
  socket.destroy();
});

test('the id of a call that failed leads to what is known of it, and the log finds it', async () => {
  await go('#/calls');
  await press('main a[href="#/calls/spin-1"]');
  await until('It caused');
  await until('killed');
  await until('call failed');
  await go('#/log');
  await page.waitForSelector('#contains');
  await page.type('#contains', 'spin-1');
  await page.waitForFunction(() => {
    const rows = [...document.querySelectorAll('main tbody tr')];
    return rows.length > 0 && rows.every((row) => row.innerText.includes('spin-1'));
  }, { timeout: PATIENCE });
  await press('main a[href="#/calls/spin-1"]');
  await until('It ended');
});

test('an action is tried by its form', async () => {
  await go('#/services/calc');
  await page.waitForSelector('#payload');
  await page.$eval('#payload', (area) => { area.value = '{"a": 2, "b": 40}'; });
  await press('#try button');
  await until('"sum": 42');
  await page.$eval('#payload', (area) => { area.value = '{'; });
  await press('#try button');
  await until('The payload is no JSON');
});

/** A Python that has requests, shared with tests/clients/over_http.py. */
function pythonWithRequests() {
  const python = join(root, 'target/http-clients/bin/python');
  const options = { stdio: 'ignore', timeout: PATIENCE };
  if (!existsSync(python)) execFileSync('python3', ['-m', 'venv', join(root, 'target/http-clients')], options);
  execFileSync(python, ['-m', 'pip', 'install', '-q', 'requests==2.32.5'], options);
  return python;
}

/** What a snippet prints. */
function run(program, text) {
  const commands = { curl: ['bash', '-c'], 'mb-server': ['bash', '-c'], Python: [pythonWithRequests(), '-c'], JavaScript: ['node', '--input-type=module', '-e'] };
  const [command, ...flags] = commands[program];
  const env = { ...process.env, PATH: `${join(root, 'target/release')}:${process.env.PATH}` };
  return execFileSync(command, [...flags, text], { env, encoding: 'utf8', timeout: PATIENCE, stdio: ['ignore', 'pipe', 'pipe'] });
}

test('what calls an action is copied from its card, and does', async () => {
  const origin = `http://127.0.0.1:${adminPort}`;
  await browser.defaultBrowserContext().overridePermissions(origin, ['clipboard-read', 'clipboard-write', 'clipboard-sanitized-write']);
  await page.bringToFront();
  await go('#/services/calc');
  await press('main details:not([open]) > summary', 'Call calc.add');
  for (const program of ['curl', 'Python', 'JavaScript', 'mb-server']) {
    await page.evaluate(() => navigator.clipboard.writeText(''));
    await press(`main button[aria-label="Copy ${program} of calc.add 1.0.0"]`);
    const copied = await page.waitForFunction(() => navigator.clipboard.readText(), { timeout: PATIENCE, polling: 100 });
    assert.match(run(program, await copied.jsonValue()), /42/, program);
  }
});

test('what is copied takes any JSON, and says what only its reader has', () => {
  globalThis.location = { hostname: 'localhost' };
  const here = { address: `127.0.0.1:${wire}`, protocols: ['frames', 'http'], tls: false, auth: 'none' };
  const value = { text: `it's "quoted" $HOME \`id\` \\ ! % \n\u2028 ünï 🎈`, list: [true, false, null, -1.5e-7, {}] };
  for (const [program, text] of snippets([here], { topic: 'echo.say', version: '1.0.0', isHighest: false }, value)) {
    const said = run(program, program === 'Python' ? text.replace('print(', '__import__("builtins").print(__import__("json").dumps(').concat(')') : text.replace('console.log(await answer.json())', 'console.log(await answer.text())'));
    assert.deepStrictEqual(JSON.parse(said), value, program);
  }
  const far = { address: '0.0.0.0:8444', protocols: ['frames', 'http'], tls: true, auth: 'required' };
  const framesOnly = { ...here, protocols: ['frames'] };
  const texts = (listeners) => Object.fromEntries(snippets(listeners, { topic: 'a.b', version: '2.0.0', isHighest: true }, 1));
  globalThis.location = { hostname: 'host.example' };
  const { curl, Python, JavaScript, 'mb-server': call } = texts([here, far]);
  assert.strictEqual(curl, `curl --cacert ca.crt -H 'Content-Type: application/json' -H 'Authorization: Bearer TOKEN' -d '1' 'https://host.example:8444/call/a.b'`);
  assert.match(Python, /"https:\/\/host\.example:8444\/call\/a\.b", json=1, headers=\{"Authorization": "Bearer TOKEN"\}, verify="ca\.crt"/);
  assert.match(JavaScript, /"Authorization":"Bearer TOKEN"/);
  assert.strictEqual(call, `mb-server call a.b '1' --version 2.0.0 --server host.example:8444 --ca ca.crt --token-file TOKEN_FILE`);
  assert.deepStrictEqual(Object.keys(texts([framesOnly])), ['mb-server']);
  globalThis.location = { hostname: '127.0.0.1' };
  assert.match(texts([far, here]).curl, new RegExp(`http://127\\.0\\.0\\.1:${wire}/`));
  delete globalThis.location;
});

test('examples come from schemas, however they refer to themselves', () => {
  const many = { type: 'object', required: Array.from({ length: 100 }, (_, n) => `p${n}`), properties: {} };
  for (const name of many.required) many.properties[name] = { $ref: '#' };
  for (const [schema, expected] of [
    [{ examples: [{ a: 2 }] }, { a: 2 }],
    [{ type: 'object', required: ['a', 'b', 'c'], properties: { a: { type: 'integer', minimum: 3 }, b: { $ref: '#/$defs/b' }, d: {} }, $defs: { b: { enum: ['x', 'y'] } } }, { a: 3, b: 'x', c: null }],
    [{ type: ['string', 'null'] }, ''],
    [{ anyOf: [{ type: 'array' }] }, []],
    [{ $ref: '#/nowhere/at/all' }, null],
    [{ $ref: '#' }, null],
    [true, null],
    [{ required: 7, properties: 3 }, { 7: null }],
  ]) assert.deepStrictEqual(example(schema), expected);
  assert.ok(JSON.stringify(example(many)).length < 100_000);
});

test('what services cost is shown', async () => {
  await go('#/services');
  const order = send('order.create', 'o-2', { customer: 'ann', items: [{ name: 'tea', price: 1, quantity: 1 }] });
  await page.waitForFunction(() => {
    const heads = [...document.querySelectorAll('main thead th')].map((head) => head.textContent);
    const row = [...document.querySelectorAll('main tbody tr')].find((found) => found.cells[0].textContent === 'order');
    const cell = (head) => row?.cells[heads.indexOf(head)]?.textContent ?? '0';
    return ['bytes in', 'bytes out', 'host calls', 'most memory'].every((head) => parseFloat(cell(head)) > 0);
  }, { timeout: PATIENCE });
  order.destroy();
  await go('#/services/calc');
  await until('of memory');
});

test('a rollback is shown and undone', async () => {
  const path = join(dir, 'services/calc.wasm');
  const bytes = readFileSync(path);
  const at = bytes.indexOf('b must not be zero');
  bytes.write('MUST', at + 2);
  const before = await page.evaluate(async () => (await (await fetch('/services/calc')).json()).versions[0].row.digest);
  writeFileSync(path, bytes);
  await page.waitForFunction(async (old) => (await (await fetch('/services/calc')).json()).versions[0].row.digest !== old, { timeout: PATIENCE, polling: 200 }, before);
  await go('#/services/calc');
  await press('main button', 'Roll back');
  await until('is not served until it changes');
  await press('main button', 'Undo the rollback');
  await without('is not served until it changes');
});

test('it is readable in both widths and themes, and axe finds nothing serious', async () => {
  for (const width of [360, 1440]) {
    for (const theme of ['light', 'dark']) {
      await page.setViewport({ width, height: 900 });
      await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: theme }]);
      for (const view of ['', 'connections', 'calls', 'calls/spin-1', 'services', 'services/calc', 'log']) {
        await go(`#/${view}`);
        await page.waitForFunction(() => document.querySelector('main h1'));
        await page.waitForNetworkIdle({ idleTime: 100, concurrency: 1 });
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        assert.ok(wide <= 0, `${view} at ${width}: ${wide} pixels too wide`);
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => globalThis.axe.run({ resultTypes: ['violations'] }));
        const grave = violations.filter(({ impact }) => ['serious', 'critical'].includes(impact));
        assert.deepStrictEqual(grave.map(({ id, nodes }) => `${id}: ${nodes[0].html}`), [], `${view} ${width} ${theme}`);
        if (process.env.SCREENSHOTS) await page.screenshot({ path: join(process.env.SCREENSHOTS, `${view.replace('/', '-') || 'overview'}-${width}-${theme}.png`) });
      }
    }
  }
  assert.deepStrictEqual(page.problems, []);
});

test('it waits calmly for a server that is gone', async () => {
  await go('#/');
  await gone(server);
  await until('unreachable; trying again');
  server = await start(adminPort);
  await page.waitForFunction(() => document.querySelector('#health').dataset.state === 'ready', { timeout: PATIENCE });
});
