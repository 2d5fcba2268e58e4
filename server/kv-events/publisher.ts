import { createServer, type AddressInfo, type Server, type Socket } from 'node:net';
import { command, frame, FrameReader, greeting, ready, type Frame } from './zmtp.js';

/** A subscriber that reads too slowly misses messages beyond this many unsent bytes. */
const MAX_UNSENT_BYTES = 16 << 20;
/** Subscribers send topics and little else. */
const MAX_RECEIVED_BYTES = 1 << 16;
const MAX_SUBSCRIBERS = 256;

interface Subscriber {
  socket: Socket;
  reader: FrameReader;
  topics: string[]; // [num_topics] latin1, so that bytes compare as they are
  isReady: boolean;
}

/**
 * A ZeroMQ PUB socket that listens: each message goes to the subscribers of a topic that it begins with, and is lost to
 * those that come later or cannot keep up. They see it by the sequence numbers.
 */
export class Publisher {
  readonly #server: Server;
  readonly #subscribers = new Set<Subscriber>();

  private constructor(server: Server) {
    this.#server = server;
  }

  /** Rejects where the address cannot be listened on. */
  static async listen(host: string, port: number, log: (line: string) => void = () => {}): Promise<Publisher> {
    const server = createServer();
    const publisher = new Publisher(server);
    server.on('connection', (socket) => publisher.#welcome(socket, log));
    server.maxConnections = MAX_SUBSCRIBERS;
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen({ host, port }, resolve);
    });
    server.on('error', (error) => log(`publishing cache events: ${error.message}`));
    return publisher;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  get numSubscribers(): number {
    return [...this.#subscribers].filter(({ topics }) => topics.length > 0).length;
  }

  publish(parts: readonly Buffer[]): void {
    const topic = parts[0]!.toString('latin1');
    const bytes = Buffer.concat(parts.map((part, index) => frame(part, { hasMore: index < parts.length - 1 })));
    for (const { socket, topics, isReady } of this.#subscribers) {
      if (!isReady || !topics.some((prefix) => topic.startsWith(prefix))) continue;
      if (socket.writableLength + bytes.length <= MAX_UNSENT_BYTES) socket.write(bytes);
    }
  }

  /** Sends what is on its way, then ends all connections. */
  async close(): Promise<void> {
    for (const { socket } of this.#subscribers) socket.destroySoon();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  #welcome(socket: Socket, log: (line: string) => void): void {
    const subscriber: Subscriber = {
      socket,
      reader: new FrameReader(MAX_RECEIVED_BYTES),
      topics: [],
      isReady: false,
    };
    this.#subscribers.add(subscriber);
    socket.on('close', () => this.#subscribers.delete(subscriber));
    socket.on('error', () => {}); // 'close' follows
    socket.on('data', (bytes) => {
      try {
        for (const next of subscriber.reader.push(bytes)) receive(subscriber, next);
      } catch (error) {
        log(`a subscriber of cache events is sent away: ${(error as Error).message}`);
        socket.destroy();
      }
    });
    socket.write(greeting());
    socket.write(ready('PUB'));
  }
}

function receive(subscriber: Subscriber, { isCommand, body }: Frame): void {
  if (!isCommand) {
    // Subscriptions of ZMTP 3.0: messages that begin with 1 or 0.
    if (body[0] === 1) subscriber.topics.push(body.toString('latin1', 1));
    else if (body[0] === 0) cancel(subscriber, body.toString('latin1', 1));
    return;
  }
  const nameEnd = 1 + (body[0] ?? 0);
  const data = body.subarray(nameEnd);
  switch (body.toString('latin1', 1, nameEnd)) {
    case 'READY':
      subscriber.isReady = true;
      break;
    case 'SUBSCRIBE':
      subscriber.topics.push(data.toString('latin1'));
      break;
    case 'CANCEL':
      cancel(subscriber, data.toString('latin1'));
      break;
    case 'PING': // time to live, then what the answer repeats
      subscriber.socket.write(command('PONG', data.subarray(2)));
      break;
    case 'ERROR':
      throw new Error(data.toString('latin1', 1));
  }
}

/** A topic subscribed to twice is cancelled twice. */
function cancel({ topics }: Subscriber, topic: string): void {
  const index = topics.indexOf(topic);
  if (index >= 0) topics.splice(index, 1);
}
