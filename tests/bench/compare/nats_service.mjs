// Answers requests to `wrap` over NATS, in its text protocol: parses JSON,
// wraps it, serialises. Answers to one chunk of input leave in one write.
import { connect } from "node:net";

const socket = connect({ host: "127.0.0.1", port: Number(process.argv[2]), noDelay: true });
socket.write('CONNECT {"verbose":false}\r\nSUB wrap work 1\r\n');
let waiting = Buffer.alloc(0);
socket.on("data", (chunk) => {
  waiting = waiting.length ? Buffer.concat([waiting, chunk]) : chunk;
  let out = "";
  let at = 0;
  for (;;) {
    const end = waiting.indexOf("\r\n", at);
    if (end < 0) break;
    const line = waiting.latin1Slice(at, end);
    if (line.startsWith("MSG ")) {
      // MSG wrap <sid> <inbox> <size>
      const words = line.split(" ");
      const size = Number(words[4]);
      if (waiting.length < end + 2 + size + 2) break;
      const echo = JSON.parse(waiting.utf8Slice(end + 2, end + 2 + size));
      let state = 1;
      for (let turn = 0; turn < (echo.spin ?? 0); turn++) state = Math.imul(state, 1664525) + 1013904223;
      const answer = JSON.stringify({ ok: state !== 0.5, echo });
      out += `PUB ${words[3]} ${Buffer.byteLength(answer)}\r\n${answer}\r\n`;
      at = end + 2 + size + 2;
    } else {
      if (line === "PING") out += "PONG\r\n";
      at = end + 2;
    }
  }
  waiting = waiting.subarray(at);
  if (out) socket.write(out);
});
socket.on("close", () => process.exit(1));
