// Lines to copy that call an action: with curl, Python, JavaScript and mb-server.

/** Parts of an example at most: schemas may hold references to themselves. */
const MOST_PARTS = 200;

/** A value for a schema: its example, or else the plainest value of its type. */
export function example(schema, root = schema, left = { parts: MOST_PARTS }) {
  left.parts -= 1;
  if (typeof schema !== 'object' || schema === null || left.parts < 0) return null;
  if (Array.isArray(schema.examples) && schema.examples.length) return schema.examples[0];
  for (const key of ['example', 'default', 'const']) if (key in schema) return schema[key];
  if (Array.isArray(schema.enum)) return schema.enum[0];
  if (String(schema.$ref).startsWith('#/')) {
    return example(schema.$ref.slice(2).split('/').reduce((found, name) => found?.[name], root), root, left);
  }
  for (const key of ['anyOf', 'oneOf', 'allOf']) if (Array.isArray(schema[key])) return example(schema[key][0], root, left);
  switch ([schema.type].flat()[0] ?? (schema.properties && 'object')) {
    case 'object': return Object.fromEntries([schema.required ?? []].flat().map((name) => [name, example(schema.properties?.[name], root, left)]));
    case 'array': return [];
    case 'string': return '';
    case 'integer': case 'number': return schema.minimum ?? 0;
    case 'boolean': return false;
    default: return null;
  }
}

const isLoopback = (host) => host === 'localhost' || host === '[::1]' || host.startsWith('127.');

/** The listener that speaks a protocol and is reached best from where this page is; `where` is its address for us. */
function choose(listeners, protocol, page = location.hostname) {
  const found = listeners.filter(({ protocols }) => protocols.includes(protocol)).map((listener) => {
    const [, host, port] = /^(.*):(\d+)$/.exec(listener.address);
    const where = `${['0.0.0.0', '[::]'].includes(host) ? page : host}:${port}`;
    const isNear = isLoopback(page) || !isLoopback(where);
    return { ...listener, where, rank: (isNear ? 0 : 2) + (listener.tls ? 1 : 0) };
  });
  return found.sort((one, other) => one.rank - other.rank)[0];
}

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A JSON value as Python writes it. */
function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(', ')}]`;
  if (value && typeof value === 'object') return `{${Object.entries(value).map(([key, part]) => `${JSON.stringify(key)}: ${python(part)}`).join(', ')}}`;
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  return JSON.stringify(value);
}

/** Pairs of a program and the text that calls an action with it; TOKEN and ca.crt stand for what only the reader has. */
export function snippets(listeners, { topic, version, isHighest }, value) {
  const text = JSON.stringify(value);
  const lines = [];
  const http = choose(listeners, 'http');
  if (http) {
    const url = `${http.tls ? 'https' : 'http'}://${http.where}/call/${topic}${isHighest ? '' : `@${version}`}`;
    const takesToken = http.auth === 'required';
    const python3 = [`json=${python(value)}`, takesToken && 'headers={"Authorization": "Bearer TOKEN"}', http.tls && 'verify="ca.crt"'];
    const headers = { 'Content-Type': 'application/json', ...(takesToken && { Authorization: 'Bearer TOKEN' }) };
    lines.push(['curl', ['curl', ...(http.tls ? ['--cacert ca.crt'] : []), ...Object.entries(headers).map(([name, field]) => `-H '${name}: ${field}'`), `-d ${shell(text)}`, shell(url)].join(' ')]);
    lines.push(['Python', `import requests\nprint(requests.post("${url}", ${python3.filter(Boolean).join(', ')}).json())`]);
    lines.push(['JavaScript', `const answer = await fetch('${url}', { method: 'POST', headers: ${JSON.stringify(headers)}, body: JSON.stringify(${text}) });\nconsole.log(await answer.json());`]);
  }
  const frames = choose(listeners, 'frames');
  if (frames) {
    const flags = [`--version ${version}`, `--server ${frames.where}`, frames.tls && '--ca ca.crt', frames.auth === 'required' && '--token-file TOKEN_FILE'];
    lines.push(['mb-server', ['mb-server call', topic, shell(text), ...flags.filter(Boolean)].join(' ')]);
  }
  return lines;
}
