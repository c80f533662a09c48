// What a service in JavaScript may find missing or other than elsewhere. A probe has one of
//
//   is: VALUE        what it answers, here and in Node.js (unless `only` says that Node.js differs)
//   fresh: RegExp    what it answers matches, and differs in every call and after a restart
//   fails: RegExp    it fails with a message that says why
//   absent: RegExp   the same, because something is absent

import { hmac } from '@noble/hashes/hmac.js';
import { sha256 } from '@noble/hashes/sha2.js';
import { bytesToHex } from '@noble/hashes/utils.js';
import CryptoJS from 'crypto-js';
import dayjs from 'dayjs';
import lodash from 'lodash';
import { Failure } from 'mb-service';
import { nanoid } from 'nanoid';
import { v4 as uuid } from 'uuid';
import { z } from 'zod';
import common from './common.cjs';
import data from './data.json' with { type: 'json' };
import { Colour, Counter, square } from './typed.ts';

const sleep = (ms, value) => new Promise((done) => setTimeout(() => done(value), ms));

async function* numbers() {
  yield 1;
  await null;
  yield 2;
}

console.log('while loading', { a: [1] });
export const drawn = Math.random();
let atLoad = 'not yet';
Promise.resolve().then(() => (atLoad = 'settled'));

class Rejected extends Error {
  name = 'Rejected';
}

export const probes = [
  // Promises
  { group: 'Promises', name: '`async` function', run: async () => (await 1) + (await Promise.resolve(2)), is: 3 },
  { group: 'Promises', name: 'a promise of a value', run: () => Promise.resolve({ a: 1 }), is: { a: 1 } },
  { group: 'Promises', name: 'a thenable', run: () => ({ then: (done) => done('thenable') }), is: 'thenable' },
  { group: 'Promises', name: 'rejection with a Failure', run: async () => { throw new Failure('NOT_YET', 'come back', { after: 3 }); }, fails: /^NOT_YET: come back.*"after":3/s },
  { group: 'Promises', name: 'rejection with an Error', run: async () => { throw new Rejected('no way'); }, fails: /Rejected: no way/ },
  { group: 'Promises', name: 'a promise that nothing settles', run: () => new Promise(() => {}), fails: /^NEVER_SETTLED: .*can never settle/ },
  { group: 'Promises', name: 'a rejection that nobody handles', run: () => { Promise.reject(new Error('forgotten')); return 1; }, fails: /forgotten/ },
  { group: 'Promises', name: '`all`, `allSettled`, `any`, `race`', run: async () => [await Promise.all([1, sleep(2, 2)]), (await Promise.allSettled([Promise.reject(3)]))[0].reason, await Promise.any([Promise.reject(), 4]), await Promise.race([sleep(50, 'slow'), sleep(1, 'quick')])], is: [[1, 2], 3, 4, 'quick'] },
  { group: 'Promises', name: '`try`, `withResolvers`', only: 'newer than Node.js 20', run: async () => { const { promise, resolve } = Promise.withResolvers(); resolve(5); return [await promise, await Promise.try(() => 6)]; }, is: [5, 6] },
  { group: 'Promises', name: '`catch`, `finally`, and a class over Promise', run: async () => { class Own extends Promise {} const seen = []; await Own.reject(1).catch((e) => seen.push(e)).finally(() => seen.push('f')); return [seen, Own.resolve() instanceof Own]; }, is: [[1, 'f'], true] },
  { group: 'Promises', name: 'the order of jobs', run: async () => { const seen = []; queueMicrotask(() => seen.push('a')); Promise.resolve().then(() => seen.push('b')).then(() => seen.push('d')); (async () => { await null; seen.push('c'); })(); await sleep(1); return seen.join(''); }, is: 'abcd' },
  { group: 'Promises', name: '`for await`, async generators', run: async () => { const seen = []; for await (const n of numbers()) seen.push(n); for await (const n of [Promise.resolve(3)]) seen.push(n); return seen; }, is: [1, 2, 3] },
  { group: 'Promises', name: '`Array.fromAsync`', only: 'newer than Node.js 20', run: () => Array.fromAsync(numbers(), (n) => n * 10), is: [10, 20] },
  { group: 'Promises', name: 'try, catch and finally around `await`', run: async () => { const seen = []; try { await Promise.reject(new Error('x')); } catch (error) { seen.push(error.message); } finally { await null; seen.push('f'); } return seen; }, is: ['x', 'f'] },
  { group: 'Promises', name: 'a promise made while the modules load', run: () => atLoad, is: 'settled' },
  { group: 'Promises', name: '`await using`', only: 'newer than Node.js 20', run: async () => { const seen = []; { await using x = { async [Symbol.asyncDispose]() { seen.push('disposed'); } }; seen.push(typeof x); } return seen; }, is: ['object', 'disposed'] },
  { group: 'Promises', name: 'ten thousand awaits', run: async () => { let sum = 0; for (let i = 0; i < 10000; i += 1) sum += await i; return sum; }, is: 49995000 },
  { group: 'Promises', name: '`async` in code that is evaluated', only: 'it works in Node.js', run: () => (0, eval)('(async () => 1)()'), fails: /can never settle/ },

  // Timers
  { group: 'Timers', name: '`setTimeout`', run: async () => { const begun = Date.now(); await sleep(30); const took = Date.now() - begun; return took >= 28 && took < 2000; }, is: true },
  { group: 'Timers', name: 'timers in order, `clearTimeout`', run: async () => { const seen = []; setTimeout(() => seen.push('c'), 20); setTimeout(() => seen.push('a'), 1); const b = setTimeout(() => seen.push('b'), 5); clearTimeout(b); await sleep(30); return seen; }, is: ['a', 'c'] },
  { group: 'Timers', name: '`setInterval`, `clearInterval`', run: () => new Promise((done) => { let n = 0; const id = setInterval(() => { n += 1; if (n === 3) { clearInterval(id); done(n); } }, 2); }), is: 3 },
  { group: 'Timers', name: '`setImmediate`, `queueMicrotask`', run: () => new Promise((done) => { const seen = []; setImmediate(() => done(seen)); queueMicrotask(() => seen.push(1)); }), is: [1] },
  { group: 'Timers', name: 'an Error in a timer', run: () => new Promise(() => setTimeout(() => { throw new Error('in a timer'); }, 1)), fails: /in a timer/, only: 'it ends the process in Node.js' },
  { group: 'Timers', name: 'longer than the deadline', timeout: 2000, run: () => sleep(60000), fails: /^TIMEOUT/, only: 'it has no deadline in Node.js' },
  { group: 'Timers', name: '`performance.now`', run: async () => { const begun = performance.now(); await sleep(5); const took = performance.now() - begun; return took > 4 && took < 1000 && Math.abs(performance.timeOrigin + performance.now() - Date.now()) < 1000; }, is: true },

  // Random numbers
  { group: 'Random', name: '`Math.random`', run: () => { const n = Math.random(); return n >= 0 && n < 1 ? n : NaN; }, fresh: /^0\.\d+$/ },
  { group: 'Random', name: '`Math.random` spreads', run: () => { const n = Array.from({ length: 10000 }, Math.random); const mean = n.reduce((a, b) => a + b) / n.length; return mean > 0.48 && mean < 0.52 && new Set(n).size === n.length; }, is: true },
  { group: 'Random', name: '`crypto.randomUUID`', run: () => crypto.randomUUID(), fresh: /^"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"$/ },
  { group: 'Random', name: '`crypto.getRandomValues`', run: () => Array.from(crypto.getRandomValues(new Uint32Array(4))).join(), fresh: /^"(\d+,){3}\d+"$/ },
  { group: 'Random', name: '`crypto.getRandomValues` of too much', run: () => { try { crypto.getRandomValues(new Uint8Array(65537)); } catch (error) { return error.name; } }, is: 'QuotaExceededError' },
  { group: 'Random', name: '`crypto.subtle`', only: 'it works in Node.js', run: () => crypto.subtle.digest('SHA-256', new Uint8Array()), absent: /crypto\.subtle is absent/ },

  // Text, URL, data
  { group: 'Text and data', name: '`TextEncoder`, `TextDecoder`', run: () => [Array.from(new TextEncoder().encode('aü€😀\ud800')), new TextDecoder().decode(new Uint8Array([0xef, 0xbb, 0xbf, 97, 0xc3, 0xbc, 0xff]))], is: [[97, 195, 188, 226, 130, 172, 240, 159, 152, 128, 239, 191, 189], 'aü\ufffd'] },
  { group: 'Text and data', name: '`TextDecoder` that is fatal, in pieces, in UTF-16', run: () => { const pieces = new TextDecoder(); let refused; try { new TextDecoder('utf-8', { fatal: true }).decode(new Uint8Array([0xff])); } catch (error) { refused = error instanceof TypeError; } return [pieces.decode(new Uint8Array([0xe2, 0x82]), { stream: true }) + pieces.decode(new Uint8Array([0xac])), refused, new TextDecoder('utf-16le').decode(new Uint8Array([0xfc, 0]))]; }, is: ['€', true, 'ü'] },
  { group: 'Text and data', name: '`URL`, `URLSearchParams`', run: () => { const url = new URL('../b?x=1&x=2#f', 'https://user@ex.com:8443/a/c'); url.searchParams.append('y', 'ä b'); return [url.href, url.port, new URLSearchParams('a=1&b=%20').get('b'), URL.canParse('nope')]; }, is: ['https://user@ex.com:8443/b?x=1&x=2&y=%C3%A4+b#f', '8443', ' ', false] },
  { group: 'Text and data', name: 'a wrong URL', run: () => { try { new URL('nope'); } catch (error) { return error instanceof TypeError; } }, is: true },
  { group: 'Text and data', name: '`structuredClone`', run: () => { const a = { m: new Map([[1, new Set([2])]]), d: new Date(0), b: new Uint8Array([1]), e: new RangeError('r') }; a.self = a; const c = structuredClone(a); return [c !== a, c.self === c, c.m.get(1).has(2), c.d.getTime(), c.b[0], c.e instanceof RangeError]; }, is: [true, true, true, 0, 1, true] },
  { group: 'Text and data', name: '`structuredClone` of a function', run: () => { try { structuredClone(() => 1); } catch (error) { return error.name; } }, is: 'DataCloneError' },
  { group: 'Text and data', name: '`atob`, `btoa`', run: () => [btoa('hällo'), atob('aOQ=')], is: ['aORsbG8=', 'hä'] },
  { group: 'Text and data', name: 'typed arrays, `DataView`, BigInt', run: () => { const view = new DataView(new ArrayBuffer(8)); view.setFloat32(0, 1.5); view.setBigUint64(0, 2n ** 63n); return [view.getUint8(0), String(BigInt.asIntN(8, 255n)), new Float32Array([0.1])[0], Array.from(new Uint8ClampedArray([300])), Array.from(new Uint16Array([3, 1, 2]).toSorted())]; }, is: [128, '-1', 0.10000000149011612, [255], [1, 2, 3]] },
  { group: 'Text and data', name: 'regular expressions: lookbehind, names, `\\p{…}`, `v`', run: () => ['a1b2'.replace(/(?<=a)\d/, '-'), '2024-05'.match(/(?<y>\d+)-/).groups.y, /^\p{Lu}\p{Script=Greek}$/u.test('Äλ'), /[\p{L}--[a-z]]/v.test('a')], is: ['a-b2', '2024', true, false] },
  { group: 'Text and data', name: 'Unicode: `normalize`, surrogates, case', run: () => ['é'.normalize('NFD').length, 'ß'.toUpperCase(), [...'😀a'].length, 'İ'.toLowerCase().length, 'a\ud800'.isWellFormed()], is: [2, 'SS', 2, 2, false] },
  { group: 'Text and data', name: 'dates in UTC', run: () => [new Date('2024-02-29T12:00:00+02:00').toISOString(), Date.UTC(2024, 1, 30), new Date(NaN).getTime() !== new Date(NaN).getTime(), new Date(2024, 0, 1).getTimezoneOffset() === new Date(2024, 6, 1).getTimezoneOffset()], is: ['2024-02-29T10:00:00.000Z', 1709251200000, true, true] },
  { group: 'Text and data', name: 'local time, which is UTC', run: () => new Date(0).getHours() + new Date(0).getTimezoneOffset(), is: 0 },
  { group: 'Text and data', name: '`Date.now`', run: () => Date.now() > 1.7e12, is: true },
  { group: 'Text and data', name: 'newer syntax: `#private`, `??=`, `at`, `groupBy`, `using`', only: 'newer than Node.js 20', run: () => { class A { #x = 1; static is(a) { return #x in a; } } let n = null; n ??= 7; const seen = []; { using d = { [Symbol.dispose]: () => seen.push('d') }; void d; } return [A.is(new A()), n, [1, 2].at(-1), Object.groupBy([1, 2, 3], (i) => (i % 2 ? 'odd' : 'even')), new Set([1, 2]).union(new Set([3])).size, seen]; }, is: [true, 7, 2, { odd: [1, 3], even: [2] }, 3, ['d']] },
  { group: 'Text and data', name: '`Proxy`, `Reflect`, `WeakMap`, `WeakRef`, `Symbol`', run: () => { const key = {}; return [new Proxy({}, { get: (t, k) => k }).hello, Reflect.ownKeys({ a: 1, [Symbol.iterator]: 2 }).length, new WeakMap([[key, 1]]).get(key), new WeakRef(key).deref() === key]; }, is: ['hello', 2, 1, true] },

  // Intl
  { group: 'Intl', name: '`Intl`', only: 'it works in Node.js', run: () => new Intl.NumberFormat('de').format(1234.5), absent: /Intl is not defined/ },
  { group: 'Intl', name: '`Number.prototype.toLocaleString`', only: 'it works in Node.js', run: () => (1234.5).toLocaleString('de'), absent: /toLocaleString needs Intl, which is absent/ },
  { group: 'Intl', name: '`Date.prototype.toLocaleString` and its kin', only: 'it works in Node.js', run: () => new Date(0).toLocaleDateString('de', { timeZone: 'Asia/Tokyo' }), absent: /toLocaleDateString needs Intl, which is absent/ },
  { group: 'Intl', name: '`localeCompare`', only: 'it works in Node.js', run: () => ['a', 'B'].sort((a, b) => a.localeCompare(b)), absent: /localeCompare needs Intl, which is absent/ },
  { group: 'Intl', name: '`toLocaleUpperCase` of Turkish', only: 'it works in Node.js', run: () => 'i'.toLocaleUpperCase('tr'), absent: /toLocaleUpperCase\('tr'\) needs Intl, which is absent/ },
  { group: 'Intl', name: '`toLocaleUpperCase` otherwise', run: () => 'iß'.toLocaleUpperCase('de'), is: 'ISS' },

  // What is absent
  { group: 'The platform', name: '`fetch`', only: 'it works in Node.js', run: () => fetch('https://example.com'), absent: /fetch is not defined/ },
  { group: 'The platform', name: '`Buffer`', only: 'it works in Node.js', run: () => Buffer.from('a'), absent: /Buffer is not defined/ },
  { group: 'The platform', name: '`process`', only: 'it works in Node.js', run: () => process.cwd(), absent: /process is not defined/ },
  { group: 'The platform', name: '`process.env.NODE_ENV`', only: 'it is unset in Node.js', run: () => process.env.NODE_ENV, is: 'production' },
  { group: 'The platform', name: '`require` of a module of Node.js', only: 'there is no require in a module', run: () => require('fs').readFileSync('/etc/passwd'), absent: /fs is a module of Node\.js, which is absent/ },
  { group: 'The platform', name: '`WebAssembly`', only: 'it works in Node.js', run: () => new WebAssembly.Memory({ initial: 1 }), absent: /WebAssembly is not defined/ },
  { group: 'The platform', name: '`Blob`, `FormData`, `ReadableStream`', only: 'it works in Node.js', run: () => [new Blob([]), new FormData(), new ReadableStream()], absent: /Blob is not defined/ },
  { group: 'The platform', name: '`AbortController`, `EventTarget`', only: 'it works in Node.js', run: () => new AbortController(), absent: /AbortController is not defined/ },
  { group: 'The platform', name: '`Worker`', only: 'Node.js has another', run: () => new Worker('x.js'), absent: /Worker is not defined/, },
  { group: 'The platform', name: '`eval`, `new Function`', run: () => [(0, eval)('1 + 1'), new Function('a', 'return a * 2')(2)], is: [2, 4] },
  { group: 'The platform', name: '`globalThis`, `global`, `self`', only: 'Node.js has no self', run: () => [globalThis === global, globalThis === self], is: [true, true] },

  // Modules
  { group: 'Modules', name: 'CommonJS, JSON', run: () => [common.double(21), data.text], is: [42, 'ü'] },
  { group: 'Modules', name: 'TypeScript: `enum`, parameter properties, types', run: () => [Colour.Red, square.sides, new Counter(1).next()], is: ['red', 4, 2] },
  { group: 'Modules', name: '`import()`', run: async () => (await import('./lazy.js')).late, is: 'loaded late' },
  { group: 'Modules', name: 'HMAC with `@noble/hashes`', run: () => bytesToHex(hmac(sha256, new TextEncoder().encode('key'), new TextEncoder().encode('The quick brown fox jumps over the lazy dog'))), is: 'f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8' },
  { group: 'Modules', name: 'HMAC with `crypto-js`', run: () => CryptoJS.HmacSHA256('The quick brown fox jumps over the lazy dog', 'key').toString(), is: 'f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8' },
  { group: 'Modules', name: '`zod`', run: () => { const parsed = z.object({ n: z.number().int() }).safeParse({ n: 1.5 }); return [parsed.success, parsed.error.issues[0].path]; }, is: [false, ['n']] },
  { group: 'Modules', name: '`lodash`', run: () => [lodash.chunk([1, 2, 3], 2), lodash.camelCase('a big-one'), lodash.get({ a: [{ b: 1 }] }, 'a[0].b')], is: [[[1, 2], [3]], 'aBigOne', 1] },
  { group: 'Modules', name: '`dayjs`', run: () => dayjs('2024-01-31').add(1, 'month').format('YYYY-MM-DD'), is: '2024-02-29' },
  { group: 'Modules', name: '`uuid`', run: () => uuid(), fresh: /^"[0-9a-f-]{36}"$/ },
  { group: 'Modules', name: '`nanoid`', run: () => nanoid(), fresh: /^"[\w-]{21}"$/ },

  // Answers
  { group: 'Answers', name: '`undefined`', run: () => undefined, fails: /^INVALID_ANSWER: the answer is undefined/ },
  { group: 'Answers', name: 'a circle', run: () => { const a = { b: [{}] }; a.b[0].c = a; return a; }, fails: /^INVALID_ANSWER: the answer is circular at \/b\/0\/c/ },
  { group: 'Answers', name: 'a BigInt', run: () => ({ 'a/b': [1n] }), fails: /^INVALID_ANSWER: the answer has a BigInt at \/a~1b\/0/ },
  { group: 'Answers', name: '`NaN`', run: () => [1, NaN], fails: /^INVALID_ANSWER: the answer has NaN at \/1/ },
  { group: 'Answers', name: 'a Map', run: () => ({ m: new Map([[1, 2]]) }), fails: /^INVALID_ANSWER: the answer has a Map at \/m/ },
  { group: 'Answers', name: 'a promise inside', run: () => ({ p: sleep(1) }), fails: /^INVALID_ANSWER: the answer has a promise at \/p: await it/ },
  { group: 'Answers', name: 'a function', run: () => () => 1, fails: /^INVALID_ANSWER: the answer has a function at its top/ },
  { group: 'Answers', name: 'a date, null, an optional field', run: () => ({ d: new Date(0), n: null, gone: undefined }), is: { d: '1970-01-01T00:00:00.000Z', n: null } },

  // Failures
  { group: 'Failures', name: 'a Failure', run: () => { throw new Failure('TEAPOT', 'short and stout', { handle: [1] }); }, fails: /^TEAPOT: short and stout.*"handle":\[1\]/s },
  { group: 'Failures', name: 'a Failure whose details have no JSON form', run: () => { throw new Failure('TEAPOT', 'x', { n: 1n }); }, fails: /^INVALID_ANSWER: the details object of TEAPOT has a BigInt at \/n/ },
  { group: 'Failures', name: 'a code that is none', run: () => { throw new Failure('tea pot', 'x'); }, fails: /tea pot is no code of a failure/ },
  { group: 'Failures', name: 'an Error, with the line that threw it', run: () => null.x, fails: /TypeError: cannot read property 'x' of null.*\(probes\.js:\d+\)/s, only: 'the message is another in Node.js' },
  { group: 'Failures', name: 'an Error with a cause', run: () => { throw new Error('outer', { cause: new RangeError('inner') }); }, fails: /Error: outer.*caused by RangeError: inner/s },
  { group: 'Failures', name: 'a thrown text', run: () => { throw 'oops'; }, fails: /thrown was oops, which is of type string and no Error/ },
  { group: 'Failures', name: 'a thrown object', run: () => { throw { code: 'X', message: 'm' }; }, fails: /thrown was \{ code: 'X', message: 'm' \}, which is of type object and no Error/ },
  { group: 'Failures', name: 'a thrown null', run: () => { throw null; }, fails: /thrown was null, which is null and no Error/ },
  { group: 'Failures', name: 'recursion without end', run: () => { const f = () => f() + 1; return f(); }, fails: /Maximum call stack|stack overflow|call stack/i },
];
