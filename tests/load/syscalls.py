#!/usr/bin/env python3
"""What becomes of the server where a system call fails, one by one.

usage: syscalls.py [--once] [CALL|CALL:ERROR]...

For each system call that the server makes (found by a run under strace) and
each of six errors, a server is started under `strace -e inject`, with an empty
cache, so that it compiles too. It gets a call over the wire, a request to the
admin endpoint, and SIGTERM. The call fails each time from the start of main
on, in each thread and in the process that compiles; with --once, only the
first time. Needs `cargo build --release` before, and strace.

As often as the main thread of `mb-server --version` makes a call, it succeeds
in each thread first, so that the loader gets by. What is made often there
(mmap, openat, read) may never fail in a thread that makes it seldom.

A row says:

  served on   everything worked, nothing was said of it
  degraded    it served, and the log has a warning
  refused     it did not, and standard error or the log says why
  SILENT      it did not, and nothing says why
  HANG        it did not start, answer or end in time
  CRASH       a signal or a panic ended it

Exits 1 for each of the last three, and where a call of MUST_SERVE is refused:
kernels, containers and sandboxes that lack it are in use.
"""
import collections, concurrent.futures, os, re, shutil, signal, socket, struct, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SERVER = os.path.join(ROOT, 'target/release/mb-server')
ERRORS = ['EPERM', 'ENOSYS', 'EACCES', 'ENOMEM', 'ENOSPC', 'EIO']
# Seconds for a start, an answer, an end.
START, ANSWER, END = 30, 10, 20
WORKERS = 2

MUST_SERVE = set('''pidfd_open prlimit64 setpgid memfd_create eventfd2
    landlock_create_ruleset landlock_add_rule landlock_restrict_self sched_getaffinity madvise
    fsync fdatasync flock mkdir rename unlink chmod fchmod getpeername shutdown ioctl access sysinfo
    set_robust_list rseq clock_gettime'''.split())
# Not tried, and why.
LEFT_OUT = {
    'execve': 'the server itself could not be started',
    'exit': 'can not fail', 'exit_group': 'can not fail', 'rt_sigreturn': 'can not fail',
    'restart_syscall': 'can not fail', 'sched_yield': 'can not fail', 'brk': 'malloc takes mmap instead, before main',
    'getpid': 'can not fail', 'gettid': 'can not fail', 'getuid': 'can not fail', 'geteuid': 'can not fail',
    'getgid': 'can not fail', 'getegid': 'can not fail', 'set_tid_address': 'can not fail',
    'arch_prctl': 'before main', 'futex': 'locks of the standard library have nothing else to wait on',
    'close': 'fails after it has closed the file, which strace can not imitate',
    'munmap': 'fails for wrong arguments alone, and the memory stays',
    'clock_nanosleep': 'sleeping in the standard library panics without it',
    'sigaltstack': 'wasmtime and the standard library panic without it',
}
# The standard library has no other source for the keys of its maps, but for a
# file that the process which compiles may not open.
LEFT_OUT_ERRORS = {'getrandom': ERRORS}
# Nobody can be answered without it, so it counts where the log says so.
NO_PEERS = {'accept4'}


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as listener:
        return listener.getsockname()[1]


class Run:
    """One server under strace, in a folder of its own."""

    def __init__(self, strace):
        self.dir = tempfile.mkdtemp(prefix='mb-syscalls-')
        os.mkdir(self.dir + '/services')
        shutil.copy(ROOT + '/services/dist/calc.wasm', self.dir + '/services')
        self.port, self.admin = free_port(), free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith('MB_')}
        env |= {'XDG_STATE_HOME': self.dir + '/state', 'XDG_CACHE_HOME': self.dir + '/cache', 'MB_LOG_FORMAT': 'text'}
        self.err = open(self.dir + '/stderr', 'w+b')
        # With -D the tracer is beside the server, which is our child.
        self.process = subprocess.Popen(
            ['strace', '-D', '-f', *strace, SERVER, 'serve', '--port', str(self.port), '--admin-port',
             str(self.admin), '--services', self.dir + '/services'],
            cwd=self.dir, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.err)

    def text(self):
        with open(self.dir + '/stderr', errors='replace') as file:
            return re.sub(r'\x1b\[[0-9;]*m', '', file.read())

    def ended(self, within):
        try:
            self.process.wait(within)
            return True
        except subprocess.TimeoutExpired:
            return False

    def reaches(self, port):
        """Waits until somebody listens; None where the server ends before."""
        until = time.time() + START
        while time.time() < until:
            if self.ended(0):
                return None
            try:
                return socket.create_connection(('127.0.0.1', port), 1)
            except OSError:
                time.sleep(0.05)
        return False

    def remove(self):
        if not self.ended(0):
            # The whole of it: the compiler is in a group of its own, and ends with its pipes.
            self.process.kill()
            self.process.wait()
        self.err.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def call(connection):
    """The first word of the answer, a code where it is an ERROR; None without one in time."""
    connection.settimeout(ANSWER)
    body = b'REQUEST:calc.add:1.0.0:1::8000\n{"a":1,"b":2}'
    try:
        connection.sendall(struct.pack('>II', len(body), 0) + body)
        answer = b''
        while b'}' not in answer:
            part = connection.recv(65536)
            if not part:
                return 'closed'
            answer += part
    except TimeoutError:
        return None
    except OSError as error:
        return str(error)
    text = answer[8:].decode(errors='replace')
    code = re.search(r'"code":"([A-Z_]+)"', text)
    return code[1] if code else text.split(':')[0]


def ready(port):
    try:
        with socket.create_connection(('127.0.0.1', port), ANSWER) as connection:
            connection.sendall(b'GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n')
            return connection.makefile('rb').readline().split()[1].decode()
    except TimeoutError:
        return None
    except (OSError, IndexError) as error:
        return str(error) or 'closed'


def complaint(text):
    """What the log or standard error says: the worst and first of it."""
    lines = text.splitlines()
    for mark in ('mb-server: ', ' ERROR ', ' WARN ', 'error', 'Error', 'failed', 'fatal'):
        for line in lines:
            if mark in line:
                return re.sub(r'^\S+Z +', '', line)[:150]
    return ''


def judge(run):
    connection = run.reaches(run.port)
    if connection is False:
        return 'HANG', 'it neither listens nor ends ' + complaint(run.text())
    if connection is None:
        status = run.process.returncode
        text = run.text()
        if status < 0 or status == 101 or 'panicked' in text:
            return 'CRASH', f'{status} at the start: {complaint(text) or text.strip()[-150:]}'
        said = complaint(text)
        return ('refused', f'{status}: {said}') if said else ('SILENT', f'{status}: {text.strip()[-100:]}')
    with connection:
        answer = call(connection)
    page = ready(run.admin)
    if run.ended(0):
        return 'CRASH', f'{run.process.returncode} while it served: {complaint(run.text())}'
    run.process.send_signal(signal.SIGTERM)
    if not run.ended(END):
        return 'HANG', f'SIGTERM does not end it; {answer}, {page}; {complaint(run.text())}'
    text = run.text()
    if run.process.returncode < 0 or 'panicked' in text:
        return 'CRASH', f'{run.process.returncode} at the end: {complaint(text)}'
    said = complaint(text)
    if answer is None or page is None:
        return 'HANG', f'no answer: call {answer}, admin {page}; {said and " " + said}'
    if answer == 'RESPONSE' and page == '200':
        return ('degraded', said) if said else ('served on', '')
    return ('refused' if said else 'SILENT'), f'call {answer}, admin {page}; {said}'


def attempt(job):
    name, error, skip, once = job
    when = f'{skip + 1}' if once else f'{skip + 1}+'
    run = Run(['-q', '-o', '/dev/null', '--seccomp-bpf', '-e', f'trace={name}', '-e', 'signal=none',
               '-e', f'inject={name}:error={error}:when={when}'])
    try:
        word, said = judge(run)
    finally:
        run.remove()
    if word == 'SILENT' and name == 'write' or word == 'HANG' and name in NO_PEERS and ' ERROR ' in said:
        word = 'refused'  # Without write there is no way to say it.
    return name, error, word, said


def counted(command, **options):
    """How often a command makes each call, in the thread that makes it most."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(['strace', '-ff', '-q', '-o', folder + '/t', *command], check=True, stdout=subprocess.DEVNULL,
                       **options)
        return read_traces(folder)


def read_traces(folder):
    most = collections.Counter()
    for file in os.listdir(folder):
        with open(os.path.join(folder, file), errors='replace') as lines:
            names = collections.Counter(match[1] for line in lines if (match := re.match(r'(\w+)\(', line)))
        most |= names
    return most


def main(arguments):
    once = '--once' in arguments
    wanted = [argument for argument in arguments if argument != '--once']
    if not shutil.which('strace'):
        sys.exit('strace is not here: apt-get install strace')
    if not os.path.exists(SERVER):
        sys.exit(f'{SERVER} is missing: cargo build --release')
    before_main = counted([SERVER, '--version'])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(['-ff', '-q', '-e', 'signal=none', '-o', folder + '/t'])
        try:
            word, said = judge(run)
        finally:
            run.remove()
        if word != 'served on':
            sys.exit(f'without any failure: {word}: {said}')
        calls = sorted(read_traces(folder))
    jobs = []
    for name in calls:
        if name in LEFT_OUT:
            continue
        chosen = [error for error in ERRORS if not wanted or name in wanted or f'{name}:{error}' in wanted]
        chosen = [error for error in chosen if error not in LEFT_OUT_ERRORS.get(name, [])]
        jobs += [(name, error, before_main[name], once) for error in chosen]
    print(f'{len(calls)} system calls, {len(jobs)} runs', flush=True)
    bad = 0
    counts = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for name, error, word, said in pool.map(attempt, jobs):
            wrong = word.isupper() or word == 'refused' and name in MUST_SERVE
            bad += wrong
            counts[word] += 1
            print(f'{name:24} {error:7} {"!" if wrong else " "} {word:10} {said}', flush=True)
    if not wanted:
        for name in calls:
            if name in LEFT_OUT:
                print(f'{name:24} not tried: {LEFT_OUT[name]}')
            if name in LEFT_OUT_ERRORS:
                print(f'{name:24} not tried with {", ".join(LEFT_OUT_ERRORS[name])}: the standard library panics')
    print(', '.join(f'{count} {word}' for word, count in counts.items()) + f'; {bad} are not as they should be')
    sys.exit(bad > 0)


main(sys.argv[1:])
