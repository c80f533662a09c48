// A client from the protocol's document alone, without packages:
//   node tests/clients/raw.mjs HOST:PORT [COUNT [SEED]]
// Sends COUNT pipelined requests as one stream, cut at random places and every
// tenth message in random pieces, and checks every answer by its id.
import net from 'node:net';

const [server = '127.0.0.1:8081', count = '1000', seedText = String(Date.now() % 1e9)] = process.argv.slice(2);
const COUNT = Number(count);
let state = Number(seedText) >>> 0 || 1;
const random = (below) => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * below);
};

const MORE = 4;
const frame = (flags, body) => {
  const head = Buffer.alloc(8);
  head.writeUInt32BE(body.length, 0);
  head.writeUInt32BE(flags, 4);
  return Buffer.concat([head, body]);
};

const frames = [];
for (let id = 0; id < COUNT; id += 1) {
  let body = Buffer.from(`REQUEST:calc.add:1.0.0:r${id}\n${JSON.stringify({ a: id, b: 1 })}`);
  while (id % 10 === 0 && random(3) > 0) {
    const cut = random(body.length);
    frames.push(frame(MORE, body.subarray(0, cut)));
    body = body.subarray(cut);
  }
  frames.push(frame(0, body));
}
const stream = Buffer.concat(frames);

const fail = (why) => {
  console.error(`${why}, seed ${seedText}`);
  process.exit(1);
};

const [, host, port] = /^\[?(.*?)\]?:(\d+)$/.exec(server) ?? fail(`${server} is not HOST:PORT`);
const seen = new Set();
const begun = process.hrtime.bigint();
let buffer = Buffer.alloc(0);
const socket = net.connect({ host, port: Number(port), noDelay: true }, async () => {
  for (let at = 0; at < stream.length; ) {
    const size = 1 + random(400);
    socket.write(stream.subarray(at, at + size));
    at += size;
    // Lets a chunk leave on its own now and then.
    if (random(4) === 0) await new Promise(setImmediate);
  }
});
socket.setTimeout(30_000, () => fail(`only ${seen.size} answers`));
socket.on('error', (error) => fail(error.message));
socket.on('close', () => seen.size < COUNT && fail(`closed after ${seen.size} answers`));
socket.on('data', (chunk) => {
  buffer = Buffer.concat([buffer, chunk]);
  while (buffer.length >= 8 && buffer.length >= 8 + buffer.readUInt32BE(0)) {
    const end = 8 + buffer.readUInt32BE(0);
    const text = buffer.subarray(8, end).toString();
    buffer = buffer.subarray(end);
    const [, id, payload] = /^RESPONSE:calc\.add:1\.0\.0:r(\d+)\n(.*)$/.exec(text) ?? fail(`unexpected: ${text}`);
    if (seen.has(id)) fail(`r${id} was answered twice`);
    if (JSON.parse(payload).sum !== Number(id) + 1) fail(`wrong: ${text}`);
    seen.add(id);
  }
  if (seen.size === COUNT) {
    const millis = Number((process.hrtime.bigint() - begun) / 1_000_000n);
    console.log(`${COUNT} right answers in ${millis} ms, seed ${seedText}`);
    socket.destroy();
  }
});
