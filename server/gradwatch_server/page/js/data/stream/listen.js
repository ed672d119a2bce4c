// Listens to the stream that all windows of a browser share; where a browser has no shared workers, to one of its own.

import { Connection } from "./connection.js";

/** @typedef {import("./connection.js").StreamMessage} StreamMessage */

const NAME = "gradwatch stream 1"; // counted up when the messages change: windows of two versions share no worker
const STARTING_MS = 30_000;

let failed = typeof SharedWorker === "undefined";

/**
 * Receive everything that happens on a stream.
 * @param {string} url @param {(message: StreamMessage) => void} receive @returns {() => void} stops it
 */
export function listen(url, receive) {
  if (failed) return listenAlone(url, receive);
  let stop = listenShared(url, receive, () => {
    failed = true; // for good: blocked by a policy, or too old for modules
    stop();
    stop = listenAlone(url, receive);
  });
  return () => stop();
}

/** @param {string} url @param {(message: StreamMessage) => void} receive */
function listenAlone(url, receive) {
  const connection = new Connection(url, receive);
  return () => connection.close();
}

/**
 * @param {string} url @param {(message: StreamMessage) => void} receive
 * @param {() => void} fall is called if the worker fails
 */
function listenShared(url, receive, fall) {
  const worker = new SharedWorker(new URL("./worker.js", import.meta.url), { type: "module", name: NAME });
  const { port } = worker;
  const timer = setTimeout(fall, STARTING_MS);
  worker.onerror = fall;
  port.onmessage = ({ data: message }) => {
    clearTimeout(timer);
    if (message) receive(message);
  };
  port.postMessage(url);
  return () => {
    clearTimeout(timer);
    worker.onerror = null;
    port.onmessage = null;
    port.postMessage(null);
    port.close();
  };
}
