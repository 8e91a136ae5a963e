// Replaces ptrace(2) in Debian's User Mode Linux on CPUs that have AMX. tests/lab/uml loads it there.
//
// User Mode Linux has room for the 2696 bytes of registers up to AVX-512 and PKRU, and sets that many. The machine's kernel accepts either all
// registers of its CPU or none (xstateregs_set, arch/x86/kernel/fpu/regset.c). With AMX these are 11,008 bytes, so that User Mode Linux would
// end with its first process. No process in User Mode Linux uses AMX, for which it needs a permission, so the missing registers are zero.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

typedef long ptrace_t(int request, int pid, void *address, void *data);

// All registers of this machine's CPU; larger than those of any CPU.
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
