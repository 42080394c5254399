# What a QEMU for the tests has: a PC with a serial line, all balloons, a disk, and the port by which
# guests of VMware find their hypervisor.
CONFIG_I440FX=y
CONFIG_Q35=y
CONFIG_SERIAL_ISA=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_BLK=y
CONFIG_VMPORT=y
