// Prints the probes as JSON, with what Node.js answers where a probe must answer the same there.
import { probes } from './probes.js';

const text = (pattern) => pattern && { source: pattern.source, flags: pattern.flags };

async function native({ run, is, only }) {
  if (is === undefined || only !== undefined) return undefined;
  try {
    return { value: await run() };
  } catch (error) {
    return { error: String(error) };
  }
}

async function list() {
  const listed = [];
  for (const probe of probes) {
    const { group, name, is, fresh, fails, absent, timeout } = probe;
    listed.push({ group, name, is, fresh: text(fresh), fails: text(fails), absent: text(absent), timeout, native: await native(probe) });
  }
  return listed;
}

list().then((listed) => process.stdout.write(JSON.stringify(listed), () => process.exit()));
