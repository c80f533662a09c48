// One service: its versions, what it may, how it does, and a form to try an action.
import { bytes, duration, h, histogram, pastCalls } from './draw.mjs';
import { example, snippets } from './examples.mjs';

export async function service(name, { read, change, mayChange, keep, notify }) {
  const [{ versions, lastCalls }, { listeners }] = await Promise.all([read(`/services/${encodeURIComponent(name)}`), read('/listeners')]);
  return [
    h('h1', {}, h('a', { href: '#/services' }, 'Services'), ` / ${name}`),
    ...versions.map((version, index) => card(name, version, { change, mayChange, notify, listeners, isHighest: index === 0 })),
    keep('try', () => attempt(name, versions, { change, mayChange })),
    h('h2', {}, 'Calls that failed or were slow'),
    pastCalls(lastCalls, 'service'),
  ];
}

function card(name, version, { change, mayChange, notify, listeners, isHighest }) {
  const row = version.row ?? {};
  const on = row.state !== 'disabled';
  const button = (what, label, more) =>
    h('button', { type: 'button', disabled: !mayChange, onclick: () => change('POST', `/services/${encodeURIComponent(name)}/${what}`, { version: version.version, ...more }) }, label);
  return h('section', { class: 'card' },
    h('h2', {}, `${version.version} `, h('small', {}, row.state ?? '')),
    h('p', {}, version.description),
    row.error ? h('p', { class: 'bad-text' }, row.error) : undefined,
    row.rolledBackFrom ? h('p', { class: 'bad-text' }, `Rolled back; the file in the folder (${row.rolledBackFrom}) is not served until it changes.`) : undefined,
    h('p', { class: 'fields' }, on ? button('disable', 'Disable') : button('enable', 'Enable'), button('rollback', 'Roll back'), row.rolledBackFrom ? button('rollback', 'Undo the rollback', { undo: true }) : undefined),
    h('dl', {},
      ...definition('file', `${row.file}, ${bytes(row.size ?? 0)}`),
      ...definition('digest', row.digest ?? '–'),
      ...definition('calls', `${row.calls ?? 0}, own failures ${row.failures ?? 0}, ended by the server ${row.errors ?? 0}`),
      ...definition('cost', `processor time ${duration((row.cpuSeconds ?? 0) * 1000)} of all versions, ${bytes(row.bytesIn ?? 0)} in, ${bytes(row.bytesOut ?? 0)} out, ${row.hostCalls ?? 0} host calls, at most ${bytes(row.peakMemory ?? 0)} of memory`),
      ...definition('isolation', version.isolation),
      ...definition('limits', Object.entries(version.limits).map(([key, value]) => `${key} ${value}`).join(', ')),
      ...definition('imports', version.imports.join(', ') || 'nothing'),
      ...definition('granted', version.grants.join(', ') || 'nothing')),
    h('h3', {}, 'Latency'), histogram(version.histogram ?? []),
    h('h3', {}, 'Actions'),
    ...version.actions.flatMap((action) => [
      h('p', {}, h('strong', {}, action.name), ` ${action.description}`),
      action.input || action.output
        ? h('details', {}, h('summary', {}, `Schemas of ${action.name}`), h('pre', {}, JSON.stringify({ input: action.input, output: action.output }, null, 2)))
        : undefined,
      calls(`${name}.${action.name}`, version.version, action.input, { notify, listeners, isHighest }),
    ]));
}

/** How an action is called, to be copied. */
function calls(topic, version, input, { notify, listeners, isHighest }) {
  const lines = snippets(listeners, { topic, version, isHighest }, input ? example(input) : {});
  return h('details', {}, h('summary', {}, `Call ${topic} ${version}`), lines.flatMap(([program, text]) => {
    const shown = h('pre', {}, text);
    return [h('p', { class: 'fields' }, program, h('button', { type: 'button', 'aria-label': `Copy ${program} of ${topic} ${version}`, onclick: () => copy(text, shown, notify) }, 'Copy')), shown];
  }));
}

/** Copies a text; where the page may not, it is selected for the reader to do so. */
async function copy(text, shown, notify) {
  try {
    await navigator.clipboard.writeText(text);
    notify('Copied.');
  } catch {
    getSelection().selectAllChildren(shown);
    notify('Selected: copy it with the keyboard.');
  }
}

const definition = (term, text) => [h('dt', {}, term), h('dd', {}, text)];

function attempt(name, versions, { change, mayChange }) {
  const said = h('pre', { id: 'tried', role: 'status' }, mayChange ? 'Not tried yet.' : 'Trying takes the token.');
  const action = h('select', { id: 'action' }, versions[0].actions.map((known) => h('option', {}, known.name)));
  const payload = h('textarea', { id: 'payload', spellcheck: false, value: '{}' });
  const send = async (event) => {
    event.preventDefault();
    let parsed;
    try {
      parsed = payload.value.trim() ? JSON.parse(payload.value) : null;
    } catch (error) {
      said.textContent = `The payload is no JSON: ${error.message}`;
      return;
    }
    said.textContent = 'calling …';
    const answer = await change('POST', `/services/${encodeURIComponent(name)}/try`, { action: action.value, payload: parsed, version: versions[0].version });
    said.textContent = answer ? JSON.stringify(answer, null, 2) : 'It was not called.';
  };
  return h('form', { class: 'card', id: 'try', onsubmit: send },
    h('h2', {}, 'Try an action'),
    h('div', { class: 'fields' }, h('label', {}, 'Action', action), h('button', {}, 'Call')),
    h('label', {}, 'Payload, JSON', payload), said);
}
