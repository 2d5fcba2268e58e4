/** 'tcp://HOST:PORT' as flags give it -> where to listen; '*' is every address of the machine. */
export function readAddress(address: string): { host: string; port: number } {
  const { hostname, port } = new URL(address.replace('tcp://*', 'tcp://0.0.0.0'));
  return { host: hostname.replace(/^\[|\]$/g, ''), port: Number(port) };
}
