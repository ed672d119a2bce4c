// The shared worker of all windows of a browser: it holds one event stream for all of them.
//
// A browser opens six connections to a server. With a stream in each window, seven windows would leave none for data.

import { Connection } from "./connection.js";

/** By address. @type {Map<string, {connection: Connection, ports: Set<MessagePort>}>} */
const streams = new Map();

/** @param {MessagePort} port @param {string} url */
function join(port, url) {
  const joined = streams.get(url);
  if (joined) {
    joined.ports.add(port);
    if (joined.connection.latest) port.postMessage(joined.connection.latest);
    return;
  }
  const ports = new Set([port]);
  const connection = new Connection(url, (message) => {
    for (const each of ports) each.postMessage(message);
  });
  streams.set(url, { connection, ports });
}

/** Close the streams that nobody listens to any more. @param {MessagePort} port */
function leave(port) {
  for (const [url, { connection, ports }] of streams) {
    ports.delete(port);
    if (ports.size) continue;
    connection.close();
    streams.delete(url);
  }
}

addEventListener("connect", (event) => {
  const [port] = /** @type {MessageEvent} */ (event).ports;
  port.onmessage = ({ data: url }) => (url === null ? leave(port) : join(port, url));
  port.postMessage(null); // it runs: the window need not open a stream of its own
});
