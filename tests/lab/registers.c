// ptrace(2) for Debian's User Mode Linux on CPUs that have AMX: loaded into it by tests/lab/uml.
//
// It has room for the 2696 bytes of registers up to AVX-512 and PKRU, and sets as many. The machine's kernel takes all that its CPU
// has or none (xstateregs_set, arch/x86/kernel/fpu/regset.c), which with AMX are 11,008 bytes: the first process would end User Mode
// Linux. Nothing in there uses AMX, whose registers take a permission, so what is missing is zeros.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

typedef long ptrace_t(int request, int pid, void *address, void *data);

// Of this kernel's registers as a whole; larger than any CPU's.
static char whole[65536];
static size_t whole_bytes;

static long set_registers(ptrace_t *ptrace, int pid, void *set, const struct iovec *some)
{
	struct iovec all = { whole, sizeof(whole) };

	if (!whole_bytes) {
		if (ptrace(PTRACE_GETREGSET, pid, set, &all) < 0)
			return -1;
		whole_bytes = all.iov_len;
		memset(whole, 0, sizeof(whole));
	}
	memcpy(whole, some->iov_base, some->iov_len);
	all.iov_len = whole_bytes;
	return ptrace(PTRACE_SETREGSET, pid, set, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
	static ptrace_t *real;
	va_list arguments;

	if (!real)
		real = (ptrace_t *)dlsym(RTLD_NEXT, "ptrace");

	va_start(arguments, request);
	int pid = va_arg(arguments, int);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);
	if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE)
		return set_registers(real, pid, address, data);
	return real(request, pid, address, data);
}
