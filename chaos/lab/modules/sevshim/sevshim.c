// SPDX-License-Identifier: GPL-2.0-only
/*
 * sevshim: gives an emulated CPU the looks of a SEV host, and lends the mailbox device the identity of a PSP.
 *
 * Load it after kvm and before ccp and kvm_amd. Three things, each once, none undone: the drivers loaded
 * afterwards have the answers compiled into their call sites, so there is no exit function.
 *
 *  1. Feature bits. TCG emulates SVM with nested paging but none of what kvm_amd insists on before it looks for
 *     SEV: nrips, decode assists, flush by ASID, and for SEV-ES on 6.12 LBR virtualisation.
 *  2. CPUID leaf 0x8000001F, through pv_ops: a module's calls of cpuid() are patched, when it is loaded, to
 *     whatever pv_ops.cpu.cpuid points to at that time.
 *  3. The PCI identity 1022:14ca in the struct pci_dev of QEMU's ivshmem device, so that the real ccp driver
 *     binds to it. Only the kernel's copy of the ids changes; configuration space stays as it is.
 */
#include <linux/module.h>
#include <linux/pci.h>
#include <asm/cpufeature.h>
#include <asm/paravirt.h>
#include <asm/processor.h>

#define LEAF_ENCRYPTION	0x8000001f
#define EAX_SEV		BIT(1)
#define EAX_SEV_ES	BIT(3)

#define IVSHMEM_VENDOR	0x1af4
#define IVSHMEM_DEVICE	0x1110
#define PSP_VENDOR	0x1022
#define PSP_DEVICE	0x14ca	/* Genoa: pspv4 with the sevv2 registers, BAR 2 */

static unsigned int sev_asids = 8;
module_param(sev_asids, uint, 0444);
MODULE_PARM_DESC(sev_asids, "ASIDs for SEV guests");

static unsigned int es_asids = 7;
module_param(es_asids, uint, 0444);
MODULE_PARM_DESC(es_asids, "ASIDs for SEV-ES guests; 0 leaves SEV-ES out");

static unsigned int c_bit = 51;
module_param(c_bit, uint, 0444);
MODULE_PARM_DESC(c_bit, "position of the C-bit in page table entries");

static typeof(pv_ops.cpu.cpuid) real_cpuid;

static void sev_cpuid(unsigned int *eax, unsigned int *ebx,
		      unsigned int *ecx, unsigned int *edx)
{
	unsigned int leaf = *eax;

	real_cpuid(eax, ebx, ecx, edx);
	if (leaf != LEAF_ENCRYPTION)
		return;

	*eax = EAX_SEV | (es_asids ? EAX_SEV_ES : 0);
	*ebx = c_bit;
	*ecx = es_asids + sev_asids;	/* highest ASID of all */
	*edx = es_asids + 1;		/* lowest ASID for plain SEV */
}

static void give_features(struct cpuinfo_x86 *c)
{
	set_cpu_cap(c, X86_FEATURE_NRIPS);
	set_cpu_cap(c, X86_FEATURE_FLUSHBYASID);
	set_cpu_cap(c, X86_FEATURE_DECODEASSISTS);
	set_cpu_cap(c, X86_FEATURE_LBRV);
	set_cpu_cap(c, X86_FEATURE_SEV);
	if (es_asids)
		set_cpu_cap(c, X86_FEATURE_SEV_ES);
}

static int __init sevshim_init(void)
{
	struct pci_dev *mailbox;
	int cpu;

	mailbox = pci_get_device(IVSHMEM_VENDOR, IVSHMEM_DEVICE, NULL);
	if (!mailbox) {
		pr_err("sevshim: no mailbox device %04x:%04x\n",
		       IVSHMEM_VENDOR, IVSHMEM_DEVICE);
		return -ENODEV;
	}
	mailbox->vendor = PSP_VENDOR;
	mailbox->device = PSP_DEVICE;
	pci_dev_put(mailbox);

	give_features(&boot_cpu_data);
	for_each_possible_cpu(cpu)
		give_features(&cpu_data(cpu));

	real_cpuid = pv_ops.cpu.cpuid;
	pv_ops.cpu.cpuid = sev_cpuid;

	pr_info("sevshim: %u SEV and %u SEV-ES ASIDs\n", sev_asids, es_asids);
	return 0;
}
module_init(sevshim_init);

MODULE_DESCRIPTION("A SEV host's CPU features and PSP identity for an emulated machine");
MODULE_LICENSE("GPL v2");
