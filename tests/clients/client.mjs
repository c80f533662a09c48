// A client in one file, written from src/wire/PROTOCOL.md alone.
//
//     node client.mjs HOST:PORT [--ca FILE [--cert FILE --key FILE]] [--token TOKEN] [--calls N]
//
// Run as a program it holds what the document says against a real server,
// prints `ok` and the number of answers, and exits 1 at the first difference.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import net from "node:net";
import tls from "node:tls";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const KEEPALIVE = 1, BINARY = 2, MORE = 4;

/** The answer is an ERROR. */
export class Refused extends Error {
  constructor({ code, message, origin, details }) {
    super(`${code}: ${message}`);
    Object.assign(this, { code, origin, details });
  }
}

/** No answer will come. `begun` is false where nothing can have run. */
export class Lost extends Error {
  constructor(why, begun) {
    super(why);
    this.begun = begun;
  }
}

const frame = (flags, body) => {
  const head = Buffer.alloc(8);
  head.writeUInt32BE(body.length, 0);
  head.writeUInt32BE(flags, 4);
  return Buffer.concat([head, body]);
};

/** One connection, with as many requests in flight as you like. */
export class Client {
  #pending = new Map();
  #pongs = [];
  #data = Buffer.alloc(0);
  #pieces = [];
  #ending = false;
  #ended = null;

  /** Connects and says hello. `secure`: the options of tls.connect. */
  static async connect(host, port, { secure, token } = {}) {
    const client = new Client();
    const options = { host, port };
    const socket = secure ? tls.connect({ ...options, ALPNProtocols: ["mb/1"], ...secure }) : net.connect(options);
    client.socket = socket.setNoDelay(true);
    socket.on("data", (data) => client.#read(data));
    socket.on("error", (error) => client.#end(error.message, false));
    socket.on("close", () => client.#end("the server closed the connection", client.#pieces.length === 0));
    client.hello = await client.call("system.hello", { client: "client.mjs/1", protocol: "1.0", token });
    return client;
  }

  /** Payload: a Buffer for bytes, anything else as JSON. */
  call(topic, payload = null, { version = "1.0.0", timeout = 5000, pieces } = {}) {
    return new Promise((resolve, reject) => {
      if (this.#ended) return reject(new Lost(this.#ended, false));
      const id = randomUUID();
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(new Lost("no answer within the timeout", true));
      }, timeout + 2000);
      this.#pending.set(id, { resolve, reject, timer });
      const binary = Buffer.isBuffer(payload) ? BINARY : 0;
      const head = Buffer.from(`REQUEST:${topic}:${version}:${id}::${timeout}\n`);
      const message = Buffer.concat([head, binary ? payload : Buffer.from(JSON.stringify(payload))]);
      const size = pieces ?? message.length;
      for (let at = 0; at < message.length; at += size) {
        const more = at + size < message.length ? MORE : 0;
        this.socket.write(frame(binary | more, message.subarray(at, at + size)));
      }
    });
  }

  /** Sends a keep-alive; the server answers with one. */
  keepAlive() {
    return new Promise((resolve) => {
      this.#pongs.push(resolve);
      this.socket.write(frame(KEEPALIVE, Buffer.alloc(0)));
    });
  }

  close() {
    this.socket.end();
  }

  #read(data) {
    this.#data = Buffer.concat([this.#data, data]);
    while (this.#data.length >= 8) {
      const length = this.#data.readUInt32BE(0), flags = this.#data.readUInt32BE(4);
      if (this.#data.length < 8 + length) return;
      const body = this.#data.subarray(8, 8 + length);
      this.#data = this.#data.subarray(8 + length);
      if (flags & KEEPALIVE) {
        this.#pongs.shift()?.();
        continue;
      }
      this.#pieces.push(body);
      if (flags & MORE) continue;
      const message = Buffer.concat(this.#pieces);
      this.#pieces = [];
      this.#answered(message, flags & BINARY);
    }
  }

  #answered(message, binary) {
    const end = message.indexOf(10);
    const [kind, , , id] = message.toString("latin1", 0, end).split(":");
    const payload = message.subarray(end + 1);
    const refused = kind === "ERROR" ? new Refused(JSON.parse(payload)) : null;
    // What names no request concerns all of them.
    if (refused && id === undefined) this.#ending ||= refused.code === "SHUTTING_DOWN";
    const waiting = this.#pending.get(id);
    if (!waiting) return;
    this.#pending.delete(id);
    clearTimeout(waiting.timer);
    if (refused) waiting.reject(refused);
    else waiting.resolve(binary ? Buffer.from(payload) : JSON.parse(payload));
  }

  #end(why, orderly) {
    this.#ended ??= why;
    for (const { reject, timer } of this.#pending.values()) {
      clearTimeout(timer);
      reject(new Lost(this.#ended, !(this.#ending && orderly)));
    }
    this.#pending.clear();
  }
}

async function main() {
  const text = { type: "string" };
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { ca: text, cert: text, key: text, token: text, calls: { type: "string", default: "200" } },
  });
  const at = positionals[0].lastIndexOf(":");
  const host = positionals[0].slice(0, at).replace(/^\[|\]$/g, ""), port = Number(positionals[0].slice(at + 1));
  const file = (name) => values[name] && readFileSync(values[name]);
  const secure = values.ca && { ca: file("ca"), cert: file("cert"), key: file("key") };
  const client = await Client.connect(host, port, { secure, token: values.token });
  assert.equal(client.hello.protocol, "1.0");
  assert.deepEqual((await client.call("system.ping", { a: [1] })).echo, { a: [1] });
  assert.deepEqual(await client.call("calc.add", { a: 2, b: 40 }), { sum: 42 });
  const names = (await client.call("system.services")).services.map(({ name }) => name);
  assert.ok(names.includes("echo") && names.includes("calc"), names.join());
  const calls = Number(values.calls);
  const said = (number) => ({ number, text: "ä".repeat((number * 7919) % 3000) });
  const pieces = (number) => [undefined, 100, 1000][number % 3];
  const ask = (number) => client.call("echo.say", said(number), { pieces: pieces(number) });
  const answers = await Promise.all(Array.from({ length: calls }, (_, number) => ask(number)));
  answers.forEach((answer, number) => assert.deepEqual(answer, said(number)));
  const bytes = Buffer.from(Array.from({ length: 2000 }, (_, index) => index % 256));
  assert.deepEqual(await client.call("echo.say", bytes, { pieces: 700 }), bytes);
  await client.keepAlive();
  for (const [topic, version, code] of [
    ["nobody.here", "1.0.0", "NO_ROUTE_FOUND"],
    ["calc.nothing", "1.0.0", "TOPIC_NOT_SUPPORTED"],
    ["calc.add", "9.0.0", "VERSION_NOT_SUPPORTED"],
  ]) {
    await assert.rejects(client.call(topic, {}, { version }), { code });
  }
  client.close();
  console.log(`ok ${calls} answers`);
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  main().catch((error) => {
    console.error(error);
    process.exit(1);
  });
}
