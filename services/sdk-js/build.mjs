// Makes a component of a service: bundles it with what QuickJS lacks, and has componentize-qjs make
// the rest. Run in the project's folder:
//
//     node build.mjs OUT.wasm [ENTRY]

import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { builtinModules } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { decode } from '@jridgewell/sourcemap-codec';
import { componentize } from 'componentize-qjs';
import * as esbuild from 'esbuild';

const SDK = path.dirname(fileURLToPath(import.meta.url));
// Where the contract lies; a project has it beside this file.
const CONTRACT = path.join(SDK, '../../wit');
const ENTRIES = ['service.ts', 'service.mts', 'service.js', 'service.mjs'];
const IMPORTED = /^(wasi|mb):/;
const ALWAYS = ['wasi:logging/logging@0.1.0-draft'];
// `async` becomes generators and `Promise`, which the runtime has a queue for.
const SUPPORTED = { 'async-await': false, 'async-generator': false, 'for-await': false, 'top-level-await': false };
// What QuickJS lacks, by the names that code has for it.
const PARTS = { URL: 'url', URLSearchParams: 'url', structuredClone: 'clone', TextEncoder: 'text', TextDecoder: 'text', 'Array.fromAsync': 'from-async' };
const DEFINED = { 'process.env.NODE_ENV': '"production"', global: 'globalThis' };
const MARK = 'mb_service_part_';
const marks = Object.fromEntries(
  Object.entries(PARTS).flatMap(([name, part]) =>
    ['', 'globalThis.', 'self.', 'window.'].map((global) => [global + name, MARK + part.replace('-', '_')])),
);
const COMMON = { bundle: true, write: false, format: 'esm', platform: 'browser', target: 'es2023', supported: SUPPORTED, logLevel: 'silent' };

/** Interfaces of the world stay imports, and go where nothing uses them. */
const interfaces = {
  name: 'interfaces',
  setup(build) {
    build.onResolve({ filter: IMPORTED }, ({ path: name }) => ({ path: name, external: true, sideEffects: false }));
  },
};

/**
 * The runtime, with those parts that the service's code names. It is bundled by itself, for it is
 * made for engines that lack what it brings.
 */
async function runtime(code) {
  const isNamed = (part) => code.includes(MARK + part.replace('-', '_'));
  const named = [...new Set(Object.values(PARTS))].filter(isNamed);
  // What esbuild makes of `async` names it too.
  if (/\bPromise\b/.test(code) || named.includes('from-async')) named.unshift('promise');
  const parts = named.map((part) => `import './runtime/${part}.js';`);
  const built = await esbuild.build({
    ...COMMON,
    stdin: { contents: `export * from './runtime/start.js'; ${parts.join(' ')}`, resolveDir: SDK },
    conditions: ['react-native', 'mb-server'],
    platform: 'neutral',
    mainFields: ['module', 'main'],
    minify: true,
    plugins: [interfaces],
  });
  return built.outputFiles[0].text;
}

/** The service behind the runtime, which is left out where it is not known yet. */
const virtual = (contents, entry) => ({
  name: 'mb-service',
  setup(build) {
    const here = { namespace: 'mb-service' };
    build.onResolve({ filter: /^#start$/ }, () => (contents === undefined ? { path: '#start', external: true } : { path: 'start', ...here }));
    build.onResolve({ filter: /^mb-service:entry$/ }, () => ({ path: 'entry', ...here }));
    build.onLoad({ filter: /^start$/, ...here }, () => ({ contents, loader: 'js', resolveDir: SDK }));
    build.onLoad({ filter: /^entry$/, ...here }, () => ({
      contents: `import { loaded } from '#start'; import { handler } from './${entry}'; loaded(); export { handler };`,
      loader: 'js',
      resolveDir: process.cwd(),
    }));
  },
});

/** Modules of Node.js: an import fails the build, and a `require` only when it is reached. */
const absentModules = {
  name: 'absent-modules',
  setup(build) {
    const names = new Set(builtinModules);
    const says = (name) => `${name} is a module of Node.js, which is absent in a service`;
    build.onResolve({ filter: /^(node:)?[a-z_/]+$/ }, async ({ path: name, kind, resolveDir, pluginData }) => {
      if (pluginData === 'again' || !names.has(name.replace(/^node:/, ''))) return undefined;
      // A package may be called like it, as buffer is, or have its own for browsers.
      if (!name.startsWith('node:')) {
        const found = await build.resolve(name, { kind, resolveDir, pluginData: 'again' });
        if (found.errors.length === 0 && !found.external) return undefined;
      }
      if (kind === 'require-call' || kind === 'require-resolve') return { path: name, namespace: 'absent' };
      return { errors: [{ text: `${says(name)}: take a package that runs in browsers too` }] };
    });
    build.onLoad({ filter: /.*/, namespace: 'absent' }, ({ path: name }) => ({
      contents: `throw new Error(${JSON.stringify(says(name))});`,
      loader: 'js',
    }));
  },
};

/**
 * Where the lines of the bundle were written: runs of a line of the bundle, the number of its file
 * (or -1) and its line there, which hold for the lines that follow.
 */
function places(built) {
  const { sources, mappings } = JSON.parse(built.outputFiles.find((file) => file.path.endsWith('.map')).text);
  const own = path.relative(process.cwd(), SDK);
  const isShown = (source) => !source.startsWith('mb-service:') && !source.startsWith(`${own}/`);
  const runs = [];
  let last = [0, -1, 0];
  decode(mappings).forEach((segments, index) => {
    const first = segments.find((segment) => segment.length > 1);
    const next = first !== undefined && isShown(sources[first[1]]) ? [index + 1, first[1], first[2] + 1] : [index + 1, -1, 0];
    const follows = next[1] === last[1] && (next[1] === -1 || next[2] - last[2] === next[0] - last[0]);
    if (follows) return;
    runs.push(...next);
    last = next;
  });
  return { sources, runs };
}

/** The world of a service imports what the bundle does. */
function world(folder, imports) {
  cpSync(path.join(CONTRACT, 'deps'), path.join(folder, 'deps'), { recursive: true });
  mkdirSync(path.join(folder, 'deps/mb-service'));
  cpSync(path.join(CONTRACT, 'service.wit'), path.join(folder, 'deps/mb-service/service.wit'));
  const lines = [...imports].sort().map((name) => `    import ${name};`);
  writeFileSync(path.join(folder, 'world.wit'), `package local:service;\nworld app {\n    include mb:service/service@1.1.0;\n${lines.join('\n')}\n}\n`);
}

/** What QuickJS says went wrong while the modules loaded, in the files as they were written. */
function explain(error, { sources, runs }) {
  const place = (line) => {
    let at = 0;
    while (at + 3 < runs.length && runs[at + 3] <= line) at += 3;
    return runs[at + 1] === -1 ? 'runtime' : `${sources[runs[at + 1]]}:${runs[at + 2] + line - runs[at]}`;
  };
  const text = String(error.message ?? error).replace(/(?:[^\s()]*\/)?component\.js:(\d+):\d+/g, (whole, line) => place(Number(line)));
  return text.split('\n').filter((line) => !/\((runtime|native)\)/.test(line)).join('\n');
}

async function build(out, chosen) {
  const entry = chosen ?? ENTRIES.find((file) => existsSync(file));
  if (entry === undefined) throw new Error(`none of ${ENTRIES.join(', ')} is here`);
  const bundle = (start) =>
    esbuild.build({
      ...COMMON,
      entryPoints: ['mb-service:entry'],
      outfile: 'component.js',
      conditions: ['mb-server'],
      define: { ...DEFINED, ...(start === undefined ? marks : {}) },
      sourcemap: 'external',
      sourcesContent: false,
      logLevel: start === undefined ? 'silent' : 'warning',
      metafile: true,
      plugins: [virtual(start, entry), interfaces, absentModules],
    });
  // The first time to see which parts of the runtime it needs; what is wrong is said the second time.
  const alone = await bundle().catch((error) => error);
  const built = await bundle(await runtime(alone.outputFiles?.find((file) => file.path.endsWith('.js')).text ?? ''));
  const imports = new Set(ALWAYS);
  for (const output of Object.values(built.metafile.outputs)) {
    for (const { path: name } of output.imports) if (IMPORTED.test(name)) imports.add(name);
  }
  const written = places(built);
  const code = built.outputFiles.find((file) => file.path.endsWith('.js')).text;
  const folder = mkdtempSync(path.join(tmpdir(), 'mb-service-'));
  try {
    world(folder, imports);
    const jsPath = path.join(folder, 'component.js');
    const jsSource = `${code}\nglobalThis.__mbPlaces = ${JSON.stringify(JSON.stringify(written))};\n`;
    writeFileSync(jsPath, jsSource);
    const { component } = await componentize({ witPath: folder, world: 'local:service/app', jsSource, jsPath, moduleRoot: folder, sync: true });
    writeFileSync(out, component);
  } catch (error) {
    throw new Error(explain(error, written));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const [out, entry] = process.argv.slice(2);
try {
  await build(out, entry);
} catch (error) {
  // esbuild has said its own errors already.
  if (error.errors === undefined) console.error(error.message);
  process.exitCode = 1;
}
